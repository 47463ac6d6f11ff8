"""Keeps the leases of all jobs that this worker runs: progress goes out and requests to cancel come in.

One thread and one ledger call for all jobs, each `renew_s`, and sooner (but at most twice a second) when
there is progress to tell. While Redis is away the jobs render on; the token decides whose result counts.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from overpaint_shared.errors import ServiceError
from overpaint_shared.ledger import Beat, Ledger, ReleaseReason, Wakeup
from overpaint_worker.metrics import Metrics

PROGRESS_EVERY_S = 0.5
STEPPING = "denoise"

log = structlog.get_logger(__name__)


@dataclass
class Attempt:
    """One running job of this worker. Written by several threads, each field by single assignments."""

    job: str
    token: int
    stage: str = "fetch"
    step: int = 0
    of: int = 0
    cancelled: bool = False
    """The ledger wants it stopped."""
    fenced: bool = False
    """It is no longer ours: another attempt has it, or we gave it back."""
    wrote: bool = False
    """It has stored files that nobody may see unless it is committed."""
    settling: bool = False
    """Its end is being told to the ledger, whose answer says what came of it."""
    since: float = field(default_factory=time.monotonic)
    """When it entered its stage."""
    number: int = 0
    """Counts the attempts at the job, for people."""

    def names(self) -> dict[str, str | int]:
        """What every log line about it says."""
        return {"job": self.job, "token": self.token, "attempt": self.number}

    def beat(self) -> Beat:
        """What the ledger is told."""
        return Beat(job_id=self.job, token=self.token, stage=self.stage, step=self.step, of=self.of)


class Keeper:
    """The running attempts and their leases."""

    def __init__(
        self,
        ledger: Ledger,
        worker_id: str,
        *,
        renew_s: float,
        publish: Callable[[Sequence[Wakeup]], None],
        on_cancel: Callable[[Attempt], None],
        on_fenced: Callable[[Attempt], None],
        metrics: Metrics | None = None,
    ) -> None:
        """`on_cancel` and `on_fenced` are told once for each attempt, in the keeper's thread."""
        self._ledger = ledger
        self._worker_id = worker_id
        self._renew_s = renew_s
        self._publish = publish
        self._on_cancel = on_cancel
        self._on_fenced = on_fenced
        self._metrics = metrics or Metrics()
        self._attempts: dict[str, Attempt] = {}
        self._lock = threading.Lock()
        self._told = threading.Event()
        self._stopping = threading.Event()
        self._away = False
        self.closed = False
        """All was given back because the worker leaves: what is claimed from now on goes back, too."""
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no more."""
        self._stopping.set()
        self._told.set()

    @property
    def running(self) -> list[Attempt]:
        """The attempts that run now."""
        with self._lock:
            return list(self._attempts.values())

    @contextmanager
    def watching(self, job: str, token: int, number: int = 0) -> Iterator[Attempt]:
        """Keep the lease of an attempt for a block."""
        attempt = Attempt(job, token, number=number)
        with self._lock:
            self._attempts[job] = attempt
        try:
            yield attempt
        finally:
            self._metrics.stage(attempt.stage, time.monotonic() - attempt.since)
            with self._lock:
                # After a long outage a second attempt may be here already.
                if self._attempts.get(job) is attempt:
                    del self._attempts[job]

    def progress(self, job: str, token: int, stage: str, step: int = 0, of: int = 0) -> None:
        """An attempt got on; told to the ledger soon, the latest word only."""
        with self._lock:
            attempt = self._attempts.get(job)
            if attempt is None or attempt.token != token:
                return
            self._measure(attempt, stage, step)
            attempt.stage, attempt.step, attempt.of = stage, step, of
        self._told.set()

    def _measure(self, attempt: Attempt, stage: str, step: int) -> None:
        if stage != attempt.stage:
            now = time.monotonic()
            self._metrics.stage(attempt.stage, now - attempt.since)
            attempt.since = now
        if stage == STEPPING:
            made = step - (attempt.step if attempt.stage == STEPPING else 0)
            self._metrics.stepped(max(0, made))  # the engine tells not each step

    def release_all(self) -> int:
        """Give every running job back, uncounted and at once, for the worker leaves; how many.

        May be called from any thread, twice too.
        """
        self.closed = True
        ours = [attempt for attempt in self.running if not attempt.fenced]
        for attempt in ours:
            attempt.fenced = True
        released = [attempt for attempt in ours if self._release(attempt)]
        for attempt in ours:
            self._on_fenced(attempt)
        return len(released)

    def _release(self, attempt: Attempt) -> bool:
        try:
            released = self._ledger.release(
                attempt.job, attempt.token, ReleaseReason.STOPPED, "its worker stopped"
            )
        except ServiceError as error:  # its lease runs out
            log.error("release failed", action="job.release_failed", error=str(error), **attempt.names())  # noqa: TRY400
            return False
        log.info("job released", action="job.released", reason="stopped", **attempt.names())
        self._metrics.released(ReleaseReason.STOPPED)
        self._publish(released.wakeups)
        return True

    def _run(self) -> None:
        renewed = 0.0
        while not self._stopping.is_set():
            self._told.wait(max(0.0, renewed + self._renew_s - time.monotonic()))
            self._told.clear()
            renewed = time.monotonic()
            try:
                self._renew()
            except Exception:  # without this thread every job of the worker would be taken for abandoned
                log.exception("unexpected error", action="lease.unexpected")
            self._stopping.wait(PROGRESS_EVERY_S)

    def _renew(self) -> None:
        running = [attempt for attempt in self.running if not attempt.fenced]
        if not running:
            return
        try:
            verdicts = self._ledger.renew(self._worker_id, [attempt.beat() for attempt in running])
        except ServiceError as error:
            self._metrics.missed(len(running))
            if not self._away:
                log.warning("leases cannot be renewed, rendering on", action="ledger.away", error=str(error))
            self._away = True
            return
        if self._away:
            log.info("leases are renewed again", action="ledger.back")
        self._away = False
        for attempt in running:
            self._obey(attempt, verdicts.get(attempt.job, "lost"))

    def _obey(self, attempt: Attempt, verdict: str) -> None:
        if verdict == "cancel" and not attempt.cancelled:
            attempt.cancelled = True
            self._metrics.cancelling()
            log.info("cancel requested", action="job.cancelling", **attempt.names())
            self._on_cancel(attempt)
        elif verdict == "lost" and not attempt.settling:
            attempt.fenced = True
            self._metrics.lost()
            log.warning("lease lost", action="job.fenced", **attempt.names())
            self._on_fenced(attempt)
