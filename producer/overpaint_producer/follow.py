"""Following jobs until they end: Pub/Sub wakes, the records in Redis are the truth, and both may be away for
a while.

Redis drops events only together with the connection, and then all records are read anew. Besides, the records
of jobs that were silent for a while are read again, a few every two seconds: those that run, then those that
wait. So twenty thousand waiting jobs cost Redis what eighty do.
"""

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from overpaint_shared.errors import LedgerDenied, LedgerUnreachable, UnknownJob
from overpaint_shared.ledger import TERMINAL, Event, JobRecord, JobState, Ledger

POLL_S = 2.0
"""A live job that said nothing for this long is looked up."""
POLL_BATCH = 80
"""So many in each of these times, those that run first, then those that were silent longest."""
PATIENCE_S = 300.0
"""How long Redis may be away; a worker's commit waits as long."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0


def follow(
    ledger: Ledger,
    owner: str,
    ids: Sequence[str],
    *,
    timeout_s: float | None = None,
    patience_s: float = PATIENCE_S,
) -> Iterator[Event]:
    """What happens to jobs, from their state now until all have ended; nothing is told twice.

    `owner` is whose jobs they are; another's are followed too, by looking. Raises UnknownJob for an id
    without a record, TimeoutError after `timeout_s` seconds, LedgerDenied when this user may not,
    LedgerUnreachable when Redis was away for `patience_s` seconds.
    """
    watch = _Watch(ids, deadline=None if timeout_s is None else time.monotonic() + timeout_s)
    outage = _Outage(patience_s)
    while watch.heard:
        try:
            with ledger.events(owner, tuple(watch.heard)) as events:
                # Only now that the subscription stands: nothing can happen between looking and listening.
                yield from watch.looked_up(tuple(watch.heard), ledger)
                outage.over()
                while watch.heard:
                    if (event := events.poll(watch.patience_s())) is not None:
                        yield from watch.news(event)
                    yield from watch.looked_up(watch.silent(), ledger)
        except LedgerDenied:
            raise
        except LedgerUnreachable as error:
            outage.wait(error, watch.patience_s())


@dataclass
class _Outage:
    """How long Redis has been away."""

    patience_s: float
    since: float | None = None
    pause_s: float = FIRST_PAUSE_S

    def over(self) -> None:
        self.since, self.pause_s = None, FIRST_PAUSE_S

    def wait(self, error: LedgerUnreachable, at_most_s: float) -> None:
        now = time.monotonic()
        self.since = self.since or now
        if now - self.since > self.patience_s:
            raise error
        time.sleep(min(self.pause_s, at_most_s))
        self.pause_s = min(LONGEST_PAUSE_S, self.pause_s * 2)


@dataclass
class _Watch:
    """The jobs that have not ended: what was told of each, and when it was heard of last."""

    ids: Sequence[str]
    deadline: float | None
    heard: dict[str, float] = field(init=False)
    told: dict[str, Event] = field(default_factory=dict)
    next_look: float = 0.0

    def __post_init__(self) -> None:
        self.heard = dict.fromkeys(self.ids, 0.0)

    def patience_s(self) -> float:
        """How long to wait for an event now. Raises TimeoutError when the time is over."""
        if self.deadline is None:
            return POLL_S
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{len(self.heard)} of {len(self.ids)} jobs have not ended in time")
        return min(POLL_S, left)

    def silent(self) -> list[str]:
        """Jobs to look up now; none until it is time again."""
        now = time.monotonic()
        if now < self.next_look:
            return []
        self.next_look = now + POLL_S
        quiet = ((self._waits(job_id), at, job_id) for job_id, at in self.heard.items() if at < now - POLL_S)
        return [job_id for _, _, job_id in heapq.nsmallest(POLL_BATCH, quiet)]

    def _waits(self, job_id: str) -> bool:
        told = self.told.get(job_id)
        return told is not None and told.state is JobState.QUEUED

    def looked_up(self, ids: Sequence[str], ledger: Ledger) -> Iterator[Event]:
        records = ledger.records(ids) if ids else {}
        for job_id in ids:
            if job_id not in records:
                raise UnknownJob(
                    f"there is no job {job_id}", field="job", value=job_id, fix="`overpaint jobs` lists them"
                )
            yield from self.news(event_of(records[job_id]))

    def news(self, event: Event) -> Iterator[Event]:
        """The event, unless it is known, older than what is known, or about a job that has ended."""
        if event.job_id not in self.heard:
            return
        self.heard[event.job_id] = time.monotonic()
        before = self.told.get(event.job_id)
        if before is not None and not _is_later(before, event):
            return
        self.told[event.job_id] = event
        if event.state in TERMINAL:
            del self.heard[event.job_id]
        yield event


def _is_later(before: Event, event: Event) -> bool:
    """Whether an event tells something new. Events that waited in a buffer may be older than a look."""
    if (event.attempt, event.state, event.stage) != (before.attempt, before.state, before.stage):
        return event.attempt >= before.attempt
    return event.step > before.step


def event_of(record: JobRecord) -> Event:
    """A record's state as an event. When a running job's last step was is not known: its `at` is 0."""
    return Event(
        job_id=record.id,
        state=record.state,
        stage=record.stage,
        step=record.step,
        of=record.of,
        attempt=record.attempt,
        at=record.ended or 0.0,
    )
