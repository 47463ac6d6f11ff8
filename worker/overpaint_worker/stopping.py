"""How a worker stops: it takes nothing more, finishes what runs within its grace, gives the rest back, and
leaves.

Signals only count; all else is decided in one thread, which works also while Celery waits for a lost broker.
"""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import structlog

TICK_S = 0.1
SETTLE_S = 1.0
EXIT_DEVICE_FAULT = 4
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Celery's own answers to these wait without bound, restart the program, or crash with a pool of threads."""

log = structlog.get_logger(__name__)


class Drainable(Protocol):
    """What the drain asks of its worker."""

    def close_intake(self) -> None:
        """Take no more messages."""

    def busy(self) -> int:
        """How many messages have not ended."""

    def release_all(self) -> int:
        """Give the running jobs back."""

    def leave(self, exit_code: int) -> None:
        """Let Celery stop."""


class Drain:
    """Waits for a reason to stop and then sees the worker out."""

    def __init__(
        self, worker: Drainable, grace_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._worker = worker
        self._grace_s = grace_s
        self._clock = clock
        self._signals = 0
        self._fault: str | None = None
        self._since: float | None = None
        self._released_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
        self.left = threading.Event()

    @property
    def asked(self) -> bool:
        """A signal came or the device is at fault."""
        return self._signals > 0 or self._fault is not None

    def until(self, seconds: float) -> None:
        """Wait so long, or until the worker is to stop."""
        end = self._clock() + seconds
        while not self.asked and (left := end - self._clock()) > 0:
            time.sleep(min(TICK_S, left))

    def start(self) -> None:
        """Take over the signals (main thread only) and wait for them."""
        for number in SIGNALS:
            signal.signal(number, self._count)
        self._thread.start()

    def fail(self, reason: str) -> None:
        """The device is at fault: stop without grace, exit code `EXIT_DEVICE_FAULT`."""
        self._fault = reason
        log.critical("device at fault, the worker stops", action="worker.device_fault", reason=reason)

    def step(self) -> bool:
        """Do what is due; True when the worker may leave."""
        if not self.asked:
            return False
        now = self._clock()
        if self._since is None:
            self._since = now
            log.info("draining", action="worker.draining", grace_s=self._grace_s, running=self._worker.busy())
            self._worker.close_intake()
        if not self._worker.busy():
            return True
        if self._released_at is None:
            if self._signals > 1 or self._fault or now - self._since >= self._grace_s:
                self._released_at = now
                log.info("releasing", action="worker.releasing", released=self._worker.release_all())
            return False
        return now - self._released_at >= SETTLE_S  # a thread that hangs in a download is left behind

    def _run(self) -> None:
        while not self._step_or_tell():
            time.sleep(TICK_S)
        log.info("drained", action="worker.drained", left_behind=self._worker.busy())
        self.left.set()
        self._worker.leave(EXIT_DEVICE_FAULT if self._fault else 0)

    def _step_or_tell(self) -> bool:
        try:
            return self.step()
        except Exception:  # without this thread no signal would end the worker
            log.exception("unexpected error", action="worker.unexpected")
            return False

    def _count(self, _signal: int, _frame: FrameType | None) -> None:
        self._signals += 1  # no lock, no log: the signal may have come in the middle of one
