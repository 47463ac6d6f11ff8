"""What in the bucket no job needs any more: attempts that were not committed, and inputs that no record
names.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from overpaint_shared.errors import DamagedRecord, LedgerDamaged, OverpaintError, StoreDenied
from overpaint_shared.ledger import InputCollector, JobState, Ledger
from overpaint_shared.ledger.inputs import SIGNED_S
from overpaint_shared.store import Store, StoredAttempt, StoredInput

log = logging.getLogger(__name__)

MIN_AGE = timedelta(hours=24)
"""Younger objects may belong to a submit or an attempt that is under way. At least twice
`store.REFRESH_AFTER`.
"""


@dataclass(frozen=True)
class Garbage:
    """Something to delete, and why."""

    item: StoredAttempt | StoredInput
    why: str
    collector: InputCollector = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The object's key, or the folder of an attempt's objects."""
        if isinstance(self.item, StoredInput):
            return f"inputs/{self.item.owner}/{self.item.sha256}"
        return f"results/{self.item.job_id}/{self.item.token}/"


def find(
    ledger: Ledger, store: Store, *, min_age: timedelta = MIN_AGE, expired_results: bool = False
) -> Iterator[Garbage]:
    """Everything older than `min_age` that may go.

    Results whose record has expired are kept unless `expired_results`: they may have been committed.
    """
    before, collector = datetime.now(UTC) - min_age, ledger.input_collector()
    for attempt in store.attempts():
        if attempt.modified < before and (why := _useless(attempt, ledger, expired_results)):
            yield Garbage(attempt, why, collector)
    for stored in store.inputs():
        if stored.modified < before and not _is_named(stored, collector):
            yield Garbage(stored, "no record names it", collector)


def delete(store: Store, garbage: Garbage) -> bool:
    """Delete it; whether that was done. An input that is needed again by now, or that another collector
    deletes, stays. `overpaint_shared.ledger.inputs` tells how submits and collectors meet.
    """
    item = garbage.item
    if isinstance(item, StoredInput):
        return _delete_input(store, garbage.collector, item)
    return store.delete_attempt(item.job_id, item.token) > 0


def _delete_input(store: Store, collector: InputCollector, item: StoredInput) -> bool:
    owner, sha256 = item.owner, item.sha256
    began, signed = (
        time.monotonic(),
        store.sign_deletion(owner, sha256, SIGNED_S),
    )  # first: see ledger/inputs.py
    verdict, ends = collector.condemn(owner, sha256)
    if verdict != "condemned":
        return False
    try:
        done = store.delete_input(owner, sha256, unmodified_since=item.modified, signed=signed)
    except StoreDenied:
        collector.deleted(owner, sha256, ends)
        if time.monotonic() - began < SIGNED_S:
            raise
        return False  # this process was stopped in between, and the signature has expired
    collector.deleted(owner, sha256, ends)
    return done


def _is_named(stored: StoredInput, collector: InputCollector) -> bool:
    """Whether a record names the input, or may do so since the index of its owner's records is damaged."""
    try:
        return collector.names(stored.owner, stored.sha256)
    except LedgerDamaged as error:
        _passed_over(error)
        return True


def _passed_over(error: OverpaintError) -> None:
    log.warning("something is passed over: %s", error, extra={"action": "gc.passed_over"})


def _useless(attempt: StoredAttempt, ledger: Ledger, expired_results: bool) -> str | None:
    """Why an attempt's objects may go, None if they must stay. A record that cannot be read keeps them."""
    try:
        record = ledger.job(attempt.job_id)
    except (DamagedRecord, LedgerDamaged) as error:
        _passed_over(error)
        return None
    if record is None:
        return "its record has expired" if expired_results else None
    if record.token != attempt.token:
        return "another attempt took its place"
    if record.state in {JobState.FAILED, JobState.CANCELLED, JobState.DEAD}:
        return f"its job is {record.state}"
    return None
