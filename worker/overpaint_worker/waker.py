"""Wakes Celery's event loop from another thread, so that a freed slot is filled at once and not at the next
timer.
"""

import contextlib
import os
from typing import Any


class Waker:
    """A pipe that the event loop reads. `wake` may be called from any thread, and before the loop runs."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def wake(self) -> None:
        """Let the loop turn once more."""
        with contextlib.suppress(BlockingIOError):  # full: it will turn anyway
            os.write(self._writer, b"\0")

    def watch(self, hub: Any) -> None:
        """Have the loop woken; called whenever Celery (re)starts its consumer."""
        hub.add_reader(self._reader, self._drain)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reader, 4096):
                pass
