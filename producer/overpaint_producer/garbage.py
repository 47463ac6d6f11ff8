"""What in the bucket no job needs any more: attempts that were not committed, and inputs that no record
names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from overpaint_shared.ledger import JobRecord, JobState, Ledger
from overpaint_shared.store import Store, StoredAttempt, StoredInput

MIN_AGE = timedelta(hours=24)
"""Younger objects may belong to a submit or an attempt that is under way. At least twice
`store.REFRESH_AFTER`.
"""
_EVERY = 1 << 40
_REFERENCE = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class Garbage:
    """Something to delete, and why."""

    item: StoredAttempt | StoredInput
    why: str

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
    before = datetime.now(UTC) - min_age
    for attempt in store.attempts():
        if attempt.modified < before and (
            why := _useless(attempt, ledger.job(attempt.job_id), expired_results)
        ):
            yield Garbage(attempt, why)
    # Listed before the records are read: an input that is named in between is too young, or written anew.
    old = [stored for stored in store.inputs() if stored.modified < before]
    named = _named(ledger) if old else set()
    for stored in old:
        if (stored.owner, stored.sha256) not in named:
            yield Garbage(stored, "no record names it")


def delete(store: Store, garbage: Garbage) -> bool:
    """Delete it; whether there was something, and it had not been written anew since it was listed."""
    item = garbage.item
    if isinstance(item, StoredInput):
        return store.delete_input(item.owner, item.sha256, unmodified_since=item.modified)
    return store.delete_attempt(item.job_id, item.token) > 0


def _useless(attempt: StoredAttempt, record: JobRecord | None, expired_results: bool) -> str | None:
    """Why an attempt's objects may go, None if they must stay."""
    if record is None:
        return "its record has expired" if expired_results else None
    if record.token != attempt.token:
        return "another attempt took its place"
    if record.state in {JobState.FAILED, JobState.CANCELLED, JobState.DEAD}:
        return f"its job is {record.state}"
    return None


def _named(ledger: Ledger) -> set[tuple[str, str]]:
    """(owner, SHA-256) of every stored picture that any record's spec names."""
    named = set()
    for listed in ledger.jobs(limit=_EVERY):
        record = ledger.job(listed.id)  # listings come without specs
        # By pattern, so that a spec of a newer version names its pictures too.
        for sha256 in _REFERENCE.findall(record.spec_json or "") if record else ():
            named.add((listed.owner, sha256))
    return named
