"""What a check says."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """It works, and something can go wrong."""
    WRONG = "wrong"
    """Jobs are or will be lost, refused or not rendered."""
    SKIPPED = "skipped"
    """These settings have no right to look."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """Its name: `redis.appendonly`."""
    level: Level
    text: str
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"check": self.check, "level": self.level.value, "text": self.text, "fix": self.fix}


@dataclass(frozen=True)
class Unknown:
    """Stands for a fact that could not be asked for."""

    why: str


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, text)


def warn(check: str, text: str, fix: str) -> Finding:
    """Something can go wrong."""
    return Finding(check, Level.WARN, text, fix)


def wrong(check: str, text: str, fix: str) -> Finding:
    """Something is wrong."""
    return Finding(check, Level.WRONG, text, fix)


def skipped(check: str, unknown: Unknown, fix: str = "ask again with the operator's settings") -> Finding:
    """Nobody looked."""
    return Finding(check, Level.SKIPPED, f"not looked at: {unknown.why}", fix)


def duration(seconds: float) -> str:
    """Seconds for people."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
