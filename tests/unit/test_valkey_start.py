"""`deploy/valkey/start.sh` starts no server that is unsafe, or that the kernel would end before it is full.

The server is a script that says that it was started; the control groups are files.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

DEPLOYED = Path(__file__).parents[2] / "deploy" / "valkey"
SERVER = '#!/bin/sh\ncase $1 in --version) echo "Valkey server v=8.1.8 sha=0" ;; *) echo started ;; esac\n'
GB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712


def start(
    tmp_path: Path, *options: str, config: str = "", more: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Start the server where control groups are those of `tmp_path`, with `more` in the environment."""
    server, settings = tmp_path / "server", tmp_path / "valkey.conf"
    server.write_text(SERVER)
    server.chmod(0o755)
    settings.write_text((DEPLOYED / "valkey.conf").read_text() + config)
    given = {f"OVERPAINT_REDIS_{role}_PASSWORD": f"the password of {role}" for role in
             ("PRODUCER", "WORKER", "MONITOR", "OPERATOR")}  # fmt: skip
    given |= {"PATH": "/usr/bin:/bin", "OVERPAINT_ACL_FILE": str(tmp_path / "users.acl")}
    given |= {"OVERPAINT_CGROUPS": str(tmp_path / "cgroup")} | dict(more or {})
    words = [DEPLOYED / "start.sh", server, settings, "--dir", str(tmp_path), *options]
    return subprocess.run(words, env=given, capture_output=True, text=True, check=False)


def limit(tmp_path: Path, memory: int | str, version: int = 2) -> None:
    """Limit the memory of what runs there."""
    name = {2: "memory.max", 1: "memory/memory.limit_in_bytes"}[version]
    file = tmp_path / "cgroup" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{memory}\n")


def own_groups() -> list[tuple[int, str]]:
    """The control groups of this process that count memory: the version, and the path."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    found = [(2, path) for _, kind, path in lines if not kind]
    return found + [(1, path) for _, kind, path in lines if "memory" in kind.split(",")]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("maxmemory", ["3gb", "3221225472", "3072MB", "3300m"])
def test_a_maxmemory_without_room_for_a_rewrite_is_refused_with_both_settings(
    tmp_path: Path, version: int, maxmemory: str
) -> None:
    limit(tmp_path, 4 * GB, version)
    refused = start(tmp_path, "--maxmemory", maxmemory)
    assert refused.returncode == 2
    assert "started" not in refused.stdout
    for named in ("OVERPAINT_REDIS_MEMORY.", "OVERPAINT_REDIS_MEMORY_LIMIT,", "limits.memory", "MemoryMax"):
        assert named in refused.stderr
    assert str(4 * GB) in refused.stderr


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("maxmemory", ["2gb", "2500mb", "1024k"])
def test_a_maxmemory_with_room_for_a_rewrite_starts(tmp_path: Path, version: int, maxmemory: str) -> None:
    limit(tmp_path, 4 * GB, version)
    done = start(tmp_path, "--maxmemory", maxmemory)
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr


@pytest.mark.parametrize(("memory", "version"), [("max", 2), (NO_LIMIT_V1, 1), ("nonsense", 2)])
def test_where_memory_has_no_limit_any_maxmemory_starts(
    tmp_path: Path, memory: int | str, version: int
) -> None:
    limit(tmp_path, memory, version)
    assert start(tmp_path, "--maxmemory", "900gb").stdout == "started\n"
    assert start(tmp_path).stdout == "started\n"


def test_where_there_are_no_control_groups_it_starts(tmp_path: Path) -> None:
    assert start(tmp_path, "--maxmemory", "900gb").stdout == "started\n"


@pytest.mark.parametrize("maxmemory", [(), ("--maxmemory", "0")])
def test_a_limit_without_maxmemory_is_refused_with_one_that_fits(
    tmp_path: Path, maxmemory: tuple[str, ...]
) -> None:
    limit(tmp_path, 4 * GB)
    refused = start(tmp_path, *maxmemory)
    assert refused.returncode == 2
    assert f"--maxmemory {2 * GB}" in refused.stderr


def test_the_last_maxmemory_counts_and_an_option_before_the_configuration(tmp_path: Path) -> None:
    limit(tmp_path, 4 * GB)
    assert start(tmp_path, config="maxmemory 2gb\n").stdout == "started\n"
    assert start(tmp_path, config="maxmemory 2gb\nmaxmemory 4gb\n").returncode == 2
    assert start(tmp_path, "--maxmemory", "2gb", config="maxmemory 4gb\n").stdout == "started\n"
    assert start(tmp_path, "--maxmemory", "2gb", "--maxmemory", "4gb").returncode == 2


def test_the_least_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    """A systemd unit's group, and the slices around it."""
    limit(tmp_path, "max")
    version, path = max(own_groups(), key=lambda group: len(group[1]))
    root = tmp_path / "cgroup" / ("" if version == 2 else "memory")
    file = root / path.lstrip("/") / ("memory.max" if version == 2 else "memory.limit_in_bytes")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{2 * GB}\n")
    assert start(tmp_path, "--maxmemory", "2gb").returncode == 2
    assert start(tmp_path, "--maxmemory", "1gb").stdout == "started\n"


def test_a_size_that_valkey_does_not_know_is_left_to_valkey(tmp_path: Path) -> None:
    limit(tmp_path, 4 * GB)
    for odd in ("2 gb", "much", "-1", "2tb"):
        assert start(tmp_path, "--maxmemory", odd).stdout == "started\n", "it says what is wrong"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"WORKER": ""}, "OVERPAINT_REDIS_WORKER_PASSWORD must have 16"),
        ({"OPERATOR": "short"}, "OVERPAINT_REDIS_OPERATOR_PASSWORD must have 16"),
        ({"MONITOR": "the password of PRODUCER"}, "OVERPAINT_REDIS_MONITOR_PASSWORD is another role's"),
    ],
)
def test_a_missing_short_or_shared_password_starts_nothing(
    tmp_path: Path, change: dict[str, str], why: str
) -> None:
    refused = start(
        tmp_path, more={f"OVERPAINT_REDIS_{role}_PASSWORD": word for role, word in change.items()}
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert why in refused.stderr


def test_a_tls_file_that_cannot_be_read_starts_nothing(tmp_path: Path) -> None:
    refused = start(tmp_path, more={"OVERPAINT_REDIS_TLS_CERT": str(tmp_path / "none.pem")})
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "OVERPAINT_REDIS_TLS_CERT must name a file" in refused.stderr
