"""How fast something goes and when it will be done: pure arithmetic on what was told when."""

from dataclasses import dataclass, field

MEMORY_S = 30.0
"""Only the last seconds count, so that a change of speed shows."""


@dataclass
class Pace:
    """A count that grows: tell it, then ask for its rate and the time left. Times are seconds of any one
    clock.
    """

    told: list[tuple[float, float]] = field(default_factory=list)
    of: float = 0

    def tell(self, at: float, count: float, of: float) -> None:
        """At `at` it stood at `count` of `of`. A count that falls begins anew; time never falls."""
        if self.told and count < self.told[-1][1]:
            self.told.clear()
        at = max(at, self.told[-1][0]) if self.told else at
        if self.told and count == self.told[-1][1]:
            return
        self.of = of
        self.told.append((at, count))
        while len(self.told) > 2 and at - self.told[1][0] > MEMORY_S:
            del self.told[0]

    def rate(self) -> float | None:
        """Counts per second, None before there are two."""
        if len(self.told) < 2:
            return None
        (first_at, first), (last_at, last) = self.told[0], self.told[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else None

    def left_s(self) -> float | None:
        """Seconds, from what was told last, until it is complete; None while the rate is not known."""
        rate = self.rate()
        return (self.of - self.told[-1][1]) / rate if rate else None


def clock(seconds: float | None) -> str:
    """`0:05`, `12:34`, `1:02:03`; `-:--` for None."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def speed(rate: float | None, unit: str) -> str:
    """`3.2 steps/s`, or `4.1 s/step` when slower than one a second; empty for None."""
    if not rate:
        return ""
    return f"{rate:.1f} {unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit}"
