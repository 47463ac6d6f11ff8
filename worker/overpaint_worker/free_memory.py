"""How much memory this process may still take: of the machine, and of the control group that limits it."""

from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 2**63


def free_memory(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """Bytes; very many where the system does not say. Memory that only caches files counts as free."""
    return min(_of_machine(proc), *(_of_group(folder) for folder in _own_groups(proc, groups)))


def _of_machine(proc: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return UNLIMITED


def _own_groups(proc: Path, groups: Path) -> list[Path]:
    """The folders of this process's control group and of those above it, each of which may have a limit."""
    found = [groups, groups / "memory"]
    with suppress(OSError, ValueError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = groups / "memory" if controllers else groups
            inner = top / path.strip("/")
            found += [inner, *(above for above in inner.parents if top in above.parents)]
    return found


def _of_group(folder: Path) -> int:
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number: there is no limit
            most = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
            return most - max(0, taken - _cached(folder, cache))
    return UNLIMITED


def _cached(folder: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
