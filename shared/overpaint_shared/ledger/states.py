"""The states of a job and the legal moves between them.

    queued ──> running ──> done | failed | dead
      │  ^        │ │
      │  │        │ └────> cancelling ──> cancelled | done
      │  └────────┘        (released, crashed, or its worker was lost)
      └──> cancelled | failed
    failed | dead ──> queued (replay)

The Lua scripts are given this very table and refuse any other move.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class JobState(StrEnum):
    """Where a job is in its life. The record in Redis is the truth about it."""

    QUEUED = "queued"
    """Waits for a worker."""
    RUNNING = "running"
    """A worker holds a lease on it."""
    CANCELLING = "cancelling"
    """Asked to stop; its worker has not confirmed yet."""
    DONE = "done"
    """Rendered, and its result committed."""
    FAILED = "failed"
    """Cannot be rendered as it stands; the record's error says why."""
    CANCELLED = "cancelled"
    """Stopped on request."""
    DEAD = "dead"
    """Took its engine down, or lost its worker, too often; kept for a person to look at."""


_S = JobState

MOVES: Final[Mapping[JobState, frozenset[JobState]]] = MappingProxyType(
    {
        _S.QUEUED: frozenset({_S.RUNNING, _S.CANCELLED, _S.FAILED}),
        _S.RUNNING: frozenset({_S.QUEUED, _S.CANCELLING, _S.DONE, _S.FAILED, _S.CANCELLED, _S.DEAD}),
        # A result that was complete before the cancel was seen is kept; anything else ends as cancelled.
        _S.CANCELLING: frozenset({_S.CANCELLED, _S.DONE}),
        _S.FAILED: frozenset({_S.QUEUED}),
        _S.DEAD: frozenset({_S.QUEUED}),
        _S.DONE: frozenset(),
        _S.CANCELLED: frozenset(),
    }
)

LEASED: Final = frozenset({_S.RUNNING, _S.CANCELLING})
"""A worker holds these."""
LIVE: Final = frozenset({_S.QUEUED}) | LEASED
"""Something will still happen to these; their records never expire."""
TERMINAL: Final = frozenset(JobState) - LIVE
"""These have ended; their records expire."""
REPLAYABLE: Final = frozenset({_S.FAILED, _S.DEAD})
"""These may be queued again."""


def is_legal(before: JobState, after: JobState) -> bool:
    """Whether a job may go from `before` to `after`."""
    return after in MOVES[before]


def next_step(state: JobState, job_id: str) -> str:
    """What to type about a job in this state, where something else was asked of it."""
    if state in LIVE:
        return f"wait for it with: overpaint watch {job_id}"
    if state is JobState.DONE:
        return f"fetch it with: overpaint get {job_id}"
    if state is JobState.CANCELLED:
        return f"submit it anew with: overpaint status {job_id} --json | jq .spec | overpaint submit -"
    return f"queue it again with: overpaint replay {job_id}"
