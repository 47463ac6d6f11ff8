"""How long jobs waited after their host or engine ended, told by the logs and by the engines' journals."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from statistics import quantiles
from typing import Any, Final

from tests.chaos.farm import Life
from tests.chaos.faults import Hit
from tests.chaos.plan import HOST_ENDS, REDIS_AWAY, S3_AWAY

ENDS: Final = {"job.done", "job.failed", "job.cancelled", "job.released", "job.fenced", "job.commit_failed"}
DEATHS: Final = {"engine.died", "engine.hung"}
EARLY_S: Final = 0.3
"""A job that was committed just before its host ended may not have said so."""


@dataclass
class Attempt:
    """One attempt at a job: who had it, from when to when, and when its engine began with it."""

    job: str
    token: int
    life: Life
    claimed: float
    ended: float | None = None
    how: str = ""
    admitted: float | None = None

    @property
    def began(self) -> float | None:
        """When it was rendered again: by the engine's word; the real engine says nothing."""
        return self.claimed if self.life.slot.real else self.admitted


@dataclass
class Waits:
    """Seconds from an end to the next start, of jobs that nothing else held up, and of the others."""

    clear: list[float] = field(default_factory=list)
    beside_others: list[float] = field(default_factory=list)
    never: list[str] = field(default_factory=list)

    def share(self, percent: int) -> float | None:
        """A percentile of the clear ones."""
        if len(self.clear) < 2:
            return self.clear[0] if self.clear else None
        return quantiles(self.clear, n=100, method="inclusive")[percent - 1]

    @property
    def longest(self) -> float | None:
        """Of the clear ones."""
        return max(self.clear, default=None)


def at(line: dict[str, Any]) -> float:
    """When a line was written."""
    return datetime.fromisoformat(line["timestamp"]).timestamp()


def attempts(lives: Iterable[Life]) -> dict[str, list[Attempt]]:
    """All attempts at each job, in order of their tokens."""
    found: dict[str, list[Attempt]] = defaultdict(list)
    for life in lives:
        for one in _of_life(life):
            found[one.job].append(one)
    for those in found.values():
        those.sort(key=lambda one: one.token)
    return found


def _of_life(life: Life) -> Iterable[Attempt]:
    mine: dict[tuple[str, int], Attempt] = {}
    for line in life.process.lines:
        action, key = line.get("action"), (str(line.get("job")), int(line.get("token") or 0))
        if action == "job.claimed":
            mine[key] = Attempt(*key, life, at(line))
        elif action in ENDS and key in mine and mine[key].ended is None:
            mine[key].ended, mine[key].how = at(line), str(action)
    for event in life.process.events:
        key = (str(event.get("job")), int(event.get("token") or 0))
        if event["event"] == "admitted" and key in mine:
            mine[key].admitted = mine[key].admitted or event["at"]
    return mine.values()


def after_hosts(hits: Iterable[Hit], found: dict[str, list[Attempt]], lease_s: float) -> Waits:
    """From the end of a host to the claim of its jobs elsewhere."""
    clock = _Clock(Waits(), outages(hits), lease_s)
    for hit in hits:
        if hit.fault.kind in HOST_ENDS and hit.life is not None:
            for one, following in _held(hit.life, hit.began, found):
                if one.ended is None and (following or one.claimed < hit.began - EARLY_S):
                    clock.note(one.job, hit.began, following.claimed if following else None)
    return clock.waits


def after_engines(
    lives: Iterable[Life], hits: Iterable[Hit], found: dict[str, list[Attempt]], *, real: bool
) -> Waits:
    """From the end of an engine to the next start of its jobs."""
    clock = _Clock(Waits(), outages(hits))
    for life in lives:
        if life.slot.real == real:
            for line in life.process.lines:
                if line.get("action") in DEATHS:
                    for one, following in _held(life, at(line), found):
                        if following is not None and one.how == "job.released":
                            clock.note(one.job, at(line), following.began)
    return clock.waits


def _held(
    life: Life, when: float, found: dict[str, list[Attempt]]
) -> Iterator[tuple[Attempt, Attempt | None]]:
    """The attempts that a worker had then, each with the one that followed."""
    for those in found.values():
        for number, one in enumerate(those):
            if one.life is life and one.claimed <= when and (one.ended is None or one.ended >= when):
                yield one, those[number + 1] if number + 1 < len(those) else None


def outages(hits: Iterable[Hit]) -> list[tuple[float, float]]:
    """From when to when a server was away."""
    return [
        (hit.began, hit.ended or hit.began)
        for hit in hits
        if hit.fault.kind in REDIS_AWAY or hit.fault.kind in S3_AWAY
    ]


@dataclass
class _Clock:
    """Sorts waits by whether an outage held the job up, too."""

    waits: Waits
    outages: list[tuple[float, float]]
    lease_s: float = 0.0

    def note(self, job: str, began: float, again: float | None) -> None:
        """A job lost its place, and began again."""
        if again is None:
            self.waits.never.append(job)
            return
        # After an outage a reaper waits one lease, which is when the leases of a host that ends then run out.
        renewal = self.lease_s / 4
        held_up = any(first < again and last > began - renewal for first, last in self.outages)
        (self.waits.beside_others if held_up else self.waits.clear).append(again - began)
