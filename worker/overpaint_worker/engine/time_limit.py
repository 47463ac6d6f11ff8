"""How long a CPU thread works at one part of a job: what takes longer fails the job.

The watchdog waits longer than that. It ends the whole engine, in which other jobs are under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic, thread_time
from typing import Final

from overpaint_shared.errors import JobError

WALL_S: Final = 120.0
"""Far below `CPU_STAGE_BUDGET_S`: what has begun goes on to its end, and then the files are written."""
COMPUTED_S: Final = 30.0
"""The thread has computed at least so long. On a machine that stood still the job is not to blame."""

_BEGAN: ContextVar[tuple[float, float] | None] = ContextVar("began", default=None)


@contextmanager
def limited() -> Iterator[None]:
    """Limit what this thread does inside; elsewhere `check` does nothing."""
    before = _BEGAN.set((monotonic(), thread_time()))
    try:
        yield
    finally:
        _BEGAN.reset(before)


def check(field: str, computed_s: float | None = None) -> None:
    """Look at the time before the next piece of work; `field` is what in the job asks for it.

    `computed_s` takes the place of COMPUTED_S. Raises JobError.
    """
    began = _BEGAN.get()
    if began is None:
        return
    wall, computed = monotonic() - began[0], thread_time() - began[1]
    if wall >= WALL_S and computed >= (COMPUTED_S if computed_s is None else computed_s):
        raise JobError(
            f"the pictures and masks of this job take more than {WALL_S:.0f} s of work",
            field=field, value=round(wall, 1),
            fix="use fewer operations and pictures, or a smaller canvas",
        )  # fmt: skip
