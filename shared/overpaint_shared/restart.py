"""When a program that ended by itself is started again. Pure; it reads no clock."""

from dataclasses import dataclass
from typing import Final

STEADY_S: Final = 60.0
LONGEST_PAUSE_S: Final = 60.0


@dataclass
class Restart:
    """After 1, 2, 4 ... seconds, at most a minute; from 1 again once it has lived for a steady minute."""

    failures: int = 0
    """Ends in a row, each after less than a steady minute."""

    def pause_s(self, lived_s: float) -> float:
        """Seconds to wait after a life of `lived_s`."""
        self.failures = 1 if lived_s >= STEADY_S else self.failures + 1
        return min(LONGEST_PAUSE_S, 2.0 ** (self.failures - 1))
