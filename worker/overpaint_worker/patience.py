"""How long an attempt goes on trying while a service is away; its lease is kept meanwhile."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog

from overpaint_shared.errors import ServiceError
from overpaint_worker.keeper import Attempt

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
WAIT_S: Final = 0.2
"""Between two looks at whether the attempt is to end."""

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Stopped(Exception):
    """The attempt is to end: cancelled, or no longer ours."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """For what an attempt tries how long, in seconds."""

    fetch_s: float = 300.0
    """Nothing is rendered yet: after this another worker may try, which may reach S3."""
    store_s: float = 86_400.0
    """What is rendered is kept until S3 takes it; giving the job back would render it anew."""
    commit_s: float = 3600.0
    """Its picture is stored, and while nobody can commit nobody can claim: the slot is of no other use."""


def check(attempt: Attempt, *, stop_on_cancel: bool = True) -> None:
    """Raise Stopped if the attempt is to end."""
    if attempt.fenced or (attempt.cancelled and stop_on_cancel):
        raise Stopped


def patiently(
    call: Callable[[], T],
    within_s: float,
    attempt: Attempt,
    retried: Callable[[], None],
    *,
    stop_on_cancel: bool = True,
) -> T:
    """Call until no service is away, for at most `within_s`; `retried` is told of each further try.

    Raises Stopped, and the ServiceError of the last try. For calls of the ledger; those of the store, which
    may hang, go through `Storage`.
    """
    end, seconds = time.monotonic() + within_s, FIRST_PAUSE_S
    while True:
        try:
            return call()
        except ServiceError as error:
            if time.monotonic() + seconds > end:
                raise
            retried()
            log.info("service away, trying again", action="service.retry", error=str(error), in_s=seconds)
        pause(seconds, attempt, stop_on_cancel=stop_on_cancel)
        seconds = min(LONGEST_PAUSE_S, seconds * 2)


def pause(seconds: float, attempt: Attempt, *, stop_on_cancel: bool = True) -> None:
    """Wait so long. Raises Stopped as soon as the attempt is to end."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check(attempt, stop_on_cancel=stop_on_cancel)
        time.sleep(min(WAIT_S, left))
