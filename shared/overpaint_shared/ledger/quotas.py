"""What an owner may have waiting and submit, and what is used of it. `quota.lua` holds submits to it.

The limits are in `op:limits` (for all owners) and `op:limits:OWNER`. Producers may only read them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from overpaint_shared.ledger.scripts import MAX_QUEUED, MAX_SPEC_BYTES, SUBMITS_PER_S
from overpaint_shared.ledger.tolerance import answers

DEFAULTS: Final[Mapping[str, int]] = {
    "max_queued": MAX_QUEUED,
    "max_spec_bytes": MAX_SPEC_BYTES,
    "submits_per_s": SUBMITS_PER_S,
}
MOST: Final = 10**15 - 1
"""The largest limit. 0 is no limit."""

Client = Any  # as in listing.py


@dataclass(frozen=True, slots=True)
class Quota:
    """An owner's limits, 0 for none, and what the jobs that wait take of them."""

    owner: str
    max_queued: int
    max_spec_bytes: int
    submits_per_s: int
    queued: int
    spec_bytes: int
    own: tuple[str, ...]
    """Which of the limits are the owner's own, not those for all."""


def quota(client: Client, owner: str) -> Quota:
    """The limits of an owner."""
    with client.pipeline(transaction=False) as pipe:
        pipe.hmget(f"op:limits:{owner}", *DEFAULTS)
        pipe.hmget("op:limits", *DEFAULTS)
        pipe.hmget(f"op:used:{owner}", "queued", "bytes")
        own, everyone, used = (row or [None] * len(DEFAULTS) for row in answers(pipe))
    limits = {
        name: next((number for text in (mine, all_) if (number := _count(text)) is not None), default)
        for (name, default), mine, all_ in zip(DEFAULTS.items(), own, everyone, strict=True)
    }
    return Quota(
        owner=owner,
        **limits,
        queued=_count(used[0]) or 0,
        spec_bytes=_count(used[1]) or 0,
        own=tuple(name for name, text in zip(DEFAULTS, own, strict=True) if _count(text) is not None),
    )


def _count(text: str | None) -> int | None:
    """As `quota.lua` reads a number: anything else is as if it were not there."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= len(str(MOST)) else None


def set_limits(client: Client, owner: str | None, limits: Mapping[str, int | None]) -> None:
    """Set limits of an owner, or for all; None takes one back."""
    key = "op:limits" if owner is None else f"op:limits:{owner}"
    with client.pipeline(transaction=True) as pipe:
        for name, value in limits.items():
            if value is None:
                pipe.hdel(key, name)
            else:
                pipe.hset(key, name, value)
        pipe.execute()
