"""How many rows a pass may have: learned for each model and shape, from real work.

The limit doubles while there is work for more rows and a row in the larger pass costs clearly less time; it
stays below the knee of the speed curve, where more rows only make every job slower. It halves when memory
runs out.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, Protocol

from overpaint_worker.engine.rows import BUCKETS

FIRST_LIMIT: Final = 2
"""One job with guidance."""

GAIN: Final = 0.05
"""A row must cost at least this share less in the larger pass."""

SAMPLES: Final = 3
"""Passes of a bucket before its time is believed. The fastest counts: other work only ever adds time."""

WARM_UP: Final = 1
"""First passes of a bucket that are not counted: they choose kernels and allocate."""


class Limits(Protocol):
    """What the loop asks for the size of a pass."""

    def rows(self, curve: Hashable) -> int:
        """How many rows a pass may have."""
        ...

    def record(self, curve: Hashable, bucket: int, seconds: float, *, more_waiting: bool) -> None:
        """A pass of `bucket` rows took `seconds`; there were more rows than fitted, or not."""
        ...

    def out_of_memory(self, curve: Hashable, bucket: int) -> None:
        """A pass of `bucket` rows did not fit the memory."""
        ...

    def largest(self) -> int:
        """The largest limit in use: what the worker's slots are counted from."""
        ...


@dataclass(frozen=True)
class FixedLimits:
    """Always `limit` rows."""

    limit: int = BUCKETS[-1]

    def rows(self, curve: Hashable) -> int:  # noqa: ARG002
        """The limit."""
        return self.limit

    def record(self, curve: Hashable, bucket: int, seconds: float, *, more_waiting: bool) -> None:
        """Nothing is learned."""

    def out_of_memory(self, curve: Hashable, bucket: int) -> None:
        """Nothing is learned; the loop splits each pass anew."""

    def largest(self) -> int:
        """The limit."""
        return self.limit


@dataclass
class _Curve:
    """One model and shape."""

    ceiling: int
    limit: int
    settled: bool = False
    passes: dict[int, int] = field(default_factory=dict)
    fastest: dict[int, float] = field(default_factory=dict)

    def believed(self, bucket: int) -> bool:
        return self.passes.get(bucket, 0) >= WARM_UP + SAMPLES

    def record(self, bucket: int, seconds: float) -> None:
        seen = self.passes.get(bucket, 0)
        self.passes[bucket] = seen + 1
        if seen >= WARM_UP:
            self.fastest[bucket] = min(seconds, self.fastest.get(bucket, seconds))

    def worse_than_half(self) -> bool:
        """A row at the limit costs about as much as in a pass of half the rows: the knee is behind us."""
        half = self.limit // 2
        if not (self.believed(self.limit) and self.believed(half)):
            return False
        return self.fastest[self.limit] / self.limit > (1 - GAIN) * self.fastest[half] / half


class RowLimits:
    """Limits that are learned. `ceiling`: rows that no pass exceeds."""

    def __init__(self, ceiling: int = BUCKETS[-1], first: int = FIRST_LIMIT) -> None:
        self._ceiling, self._first = ceiling, min(first, ceiling)
        self._curves: dict[Hashable, _Curve] = {}

    def _curve(self, key: Hashable) -> _Curve:
        return self._curves.setdefault(key, _Curve(self._ceiling, self._first))

    def rows(self, curve: Hashable) -> int:
        """How many rows a pass may have."""
        return self._curve(curve).limit

    def record(self, curve: Hashable, bucket: int, seconds: float, *, more_waiting: bool) -> None:
        """Learn from a pass: back off behind the knee, or try twice the rows where more are waiting."""
        c = self._curve(curve)
        c.record(bucket, seconds)
        if c.settled or bucket != c.limit or not c.believed(bucket):
            return
        if c.worse_than_half() and c.limit // 2 >= self._first:
            c.limit, c.settled = c.limit // 2, True
        elif more_waiting and c.limit * 2 <= c.ceiling:
            c.limit *= 2

    def out_of_memory(self, curve: Hashable, bucket: int) -> None:
        """Never again as many rows as this."""
        c = self._curve(curve)
        c.ceiling = max(bucket // 2, 1)
        c.limit = min(c.limit, c.ceiling)

    def largest(self) -> int:
        """The largest limit in use, or the first one."""
        return max((c.limit for c in self._curves.values()), default=self._first)
