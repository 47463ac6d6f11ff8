"""What this machine says: its disk and memory, this installation, its settings."""

import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from overpaint_shared import __version__
from overpaint_shared.misspelt import misspelt
from overpaint_shared.settings import SECRETS

if TYPE_CHECKING:
    from overpaint_shared.settings import Settings

PACKAGES: Final = (
    "boto3",
    "celery",
    "kombu",
    "pillow",
    "pydantic",
    "redis",
    "torch",
    "diffusers",
    "transformers",
)
DATA: Final = Path("overpaint-data")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*([^;\[]*)(;.*)?")


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A configuration file."""

    path: str
    mode: int
    secrets: tuple[str, ...]
    """The settings in it that may hold a secret."""


@dataclass(frozen=True, kw_only=True)
class LocalFacts:
    """What is known of this machine."""

    version: str = __version__
    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    unmet: tuple[str, ...] = ()
    """Requirements of this distribution that the installed packages do not meet."""
    config: ConfigFile | None = None
    misspelt: tuple[str, ...] = ()
    disks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Folder -> (free bytes, all bytes)."""
    memory: tuple[int, int] | None = None
    """(available bytes, all bytes)."""


def gather(settings: "Settings") -> LocalFacts:
    """Look around."""
    installed = {name: found for name in PACKAGES if (found := _version(name))}
    return LocalFacts(
        python=".".join(map(str, sys.version_info[:3])),
        packages=installed,
        unmet=tuple(_unmet()),
        config=_config(settings),
        misspelt=tuple(misspelt()),
        disks=_disks(),
        memory=_memory(),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unmet() -> list[str]:
    try:
        wanted = metadata.requires("overpaint") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for text in wanted:
        match = _REQUIREMENT.match(text)
        if match is None or match[3]:  # extras are for those who ask for them
            continue
        version = _version(match[1])
        if version is None or not _meets(version, match[2]):
            found.append(f"{text} (installed: {version or 'none'})")
    return found


def _meets(version: str, wanted: str) -> bool:
    """Whether a version meets `>=1.2,<3`; what is written otherwise counts as met."""
    for each in filter(None, wanted.split(",")):
        sign, limit = re.match(r"\s*(>=|<)?(.*)", each).groups()  # type: ignore[union-attr]
        if sign == ">=" and _numbers(version) < _numbers(limit):
            return False
        if sign == "<" and _numbers(version) >= _numbers(limit):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _config(settings: "Settings") -> ConfigFile | None:
    """The configuration file that these settings came from."""
    given = {name: settings.source(name) for name in type(settings).model_fields}
    files = {source.removeprefix("in ") for source in given.values() if source and source.startswith("in ")}
    if not files:
        return None
    path = files.pop()
    secret = tuple(sorted(name for name in SECRETS if given.get(name) == f"in {path}"))
    return ConfigFile(path=path, mode=stat.S_IMODE(Path(path).stat().st_mode), secrets=secret)


def _disks() -> dict[str, tuple[int, int]]:
    """One folder of each file system that this machine's part of the farm writes to."""
    folders = [
        DATA,
        Path.cwd(),
        Path(tempfile.gettempdir()),
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")),
    ]
    found: dict[int, tuple[str, tuple[int, int]]] = {}
    for folder in (each.expanduser() for each in folders):
        if folder.is_dir():
            usage = shutil.disk_usage(folder)
            found.setdefault(folder.stat().st_dev, (str(folder), (usage.free, usage.total)))
    return dict(found.values())


def _memory() -> tuple[int, int] | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    amounts = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" not in amounts:
        return None
    return amounts["MemAvailable"], amounts["MemTotal"]
