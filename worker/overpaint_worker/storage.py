"""A worker's way to S3: calls that may hang, made in threads that may be left behind.

An attempt waits for its calls and looks meanwhile whether it is to end. So a cancel ends it within a second
though S3 accepts and never answers; the thread that hangs is left to its time-outs, and there are `THREADS`
of them at most. While S3 is away, or more bytes wait to be written than may, the worker takes no jobs. One
object that cannot be read is not S3: where such a call fails, S3 is asked for something else before it counts
as away.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import structlog

from overpaint_shared.errors import ServiceError, StoreDenied, StoreError, StoreNoBucket, StoreUnreachable
from overpaint_shared.store import Store
from overpaint_shared.store_errors import is_final
from overpaint_worker.keeper import Attempt
from overpaint_worker.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S, WAIT_S, check, pause

THREADS: Final = 16
LATER_THREADS: Final = 2
"""For what nobody waits for; so it takes no thread from the attempts, however long S3 hangs."""
SILENT_S: Final = 5.0
"""A call that takes longer is told as waiting; it may still succeed."""
PROBE_S: Final = 2.0
MAX_HELD_BYTES: Final = 1 << 30
"""Of rendered files that wait to be written."""
WAITING: Final = "waiting for S3"
"""The stage of an attempt for which S3 is away."""

REFUSED: Final = (StoreDenied, StoreNoBucket)
"""What the farm's own bucket answers for all of its objects alike."""

T = TypeVar("T")
log = structlog.get_logger(__name__)


class ObjectFails(Exception):
    """S3 answers, but for one object it has failed for as long as that was tried."""


@dataclass(frozen=True)
class _Asker:
    """For whom a call is made."""

    attempt: Attempt
    stop_on_cancel: bool
    one_object: bool
    """The call is about an object that may be at fault itself."""

    def check(self) -> None:
        """Raise Stopped if the attempt is to end."""
        check(self.attempt, stop_on_cancel=self.stop_on_cancel)


class Teller(Protocol):
    """Who is told how an attempt stands; a worker's keeper of leases."""

    def progress(self, job: str, token: int, stage: str, step: int = 0, of: int = 0) -> None:
        """An attempt entered a stage."""


class Storage:
    """The store as the attempts of one worker use it."""

    def __init__(
        self,
        store: Store,
        teller: Teller,
        retried: Callable[[], None],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`retried` is told of each further try, `changed` when `blocked` may have changed."""
        self.store = store
        self._teller = teller
        self._retried = retried
        self._changed = changed
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        self._later_threads = ThreadPoolExecutor(LATER_THREADS, thread_name_prefix="store-later")
        self._lock = threading.Lock()
        self._later: set[Hashable] = set()
        self._ping: Future[None] | None = None
        self._pinged = 0.0
        self._trying = 0
        self._held = 0
        self._stopping = threading.Event()
        self.away = False

    @property
    def blocked(self) -> bool:
        """No job should be taken: S3 is away, or too much waits for it."""
        return self.away or self._held > MAX_HELD_BYTES

    def start(self) -> None:
        """Ask an S3 that is away, now and then, where no attempt does."""
        threading.Thread(target=self._probe, name="store-probe", daemon=True).start()

    def stop(self) -> None:
        """Ask no more."""
        self._stopping.set()

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Rendered files of `size` bytes wait in this block."""
        self._hold(size)
        try:
            yield
        finally:
            self._hold(-size)

    def patiently(
        self,
        call: Callable[[], T],
        within_s: float,
        attempt: Attempt,
        stage: str,
        *,
        stop_on_cancel: bool = True,
        object_s: float | None = None,
    ) -> T:
        """As `all`, of one call."""
        found = self.all(
            {"": call}, within_s, attempt, stage, stop_on_cancel=stop_on_cancel, object_s=object_s
        )
        return found[""]

    def all(
        self,
        calls: Mapping[str, Callable[[], T]],
        within_s: float,
        attempt: Attempt,
        stage: str,
        *,
        stop_on_cancel: bool = True,
        object_s: float | None = None,
    ) -> dict[str, T]:
        """Make calls side by side, and those that fail because S3 is away again; their answers by name.

        `stage` is what the attempt does when S3 answers. Raises Stopped as soon as the attempt is to end, and
        a StoreError that trying again does not mend, or of the last try after `within_s`. No call is begun
        while another of the last round runs.

        `object_s`: the calls are about objects that were there before. If they fail after that time though
        S3 answers other questions, raises ObjectFails. Without, any failure means that S3 is away.
        """
        began, seconds, done = time.monotonic(), FIRST_PAUSE_S, dict[str, T]()
        end = began + within_s
        asker = _Asker(attempt, stop_on_cancel, object_s is not None)
        with self._asking():
            while True:
                asker.check()
                left = {name: call for name, call in calls.items() if name not in done}
                error = self._round(left, done, end, asker)
                if error is None:
                    self._is_back(attempt, stage)
                    return done
                at_fault = self._failed(error, asker)
                if at_fault and time.monotonic() + seconds > began + (object_s or 0):
                    raise ObjectFails(str(error))
                if time.monotonic() + seconds > end:
                    raise error
                self._retried()
                log.info("service away, trying again", action="service.retry", error=str(error), in_s=seconds)
                pause(seconds, attempt, stop_on_cancel=stop_on_cancel)
                seconds = min(LONGEST_PAUSE_S, seconds * 2)

    def later(self, name: Hashable, call: Callable[[], object]) -> None:
        """Make a call whose answer nobody waits for, unless one of this name still waits or runs."""
        with self._lock:
            if name in self._later:
                return
            self._later.add(name)
        self._later_threads.submit(self._made, name, call)

    def _made(self, name: Hashable, call: Callable[[], object]) -> None:
        try:
            call()
        finally:
            with self._lock:
                self._later.discard(name)

    def _round(
        self, calls: Mapping[str, Callable[[], T]], done: dict[str, T], end: float, asker: _Asker
    ) -> ServiceError | None:
        """One try of each call; the error of one that may be tried again, after all have ended."""
        futures = {name: self._threads.submit(call) for name, call in calls.items()}
        failed: ServiceError | None = None
        try:
            for name, future in futures.items():
                try:
                    done[name] = self._answer(future, end, asker)
                except ServiceError as error:
                    if is_final(error):
                        raise
                    failed = error
        finally:
            for future in futures.values():
                future.cancel()  # what has not begun
        return failed

    def _answer(self, future: "Future[T]", end: float, asker: _Asker) -> T:
        began, told = time.monotonic(), False
        while True:
            wait([future], WAIT_S)
            if future.done():
                return future.result()
            asker.check()
            now = time.monotonic()
            if now < min(end, began + SILENT_S) or (told and now < end):
                continue
            silent = StoreUnreachable(
                f"the S3 server at {self.store.endpoint} has not answered for {now - began:.0f} s"
            )
            if now >= end:
                raise silent
            self._failed(silent, asker)
            told = True

    # Away and back

    def _failed(self, error: ServiceError, asker: _Asker) -> bool:
        """A call failed. Whether S3 answers all the same, so that the object is at fault."""
        if not isinstance(error, StoreError):  # a call may ask the ledger, too
            return False
        self._teller.progress(asker.attempt.job, asker.attempt.token, WAITING)
        if asker.one_object and not isinstance(error, REFUSED) and self._answers(asker):
            self._is_back()
            return True
        self._is_away(error)
        return False

    def _answers(self, asker: _Asker) -> bool:
        """Whether S3 answers another question. All attempts share one question every `PROBE_S`."""
        with self._lock:
            if self._ping is None or (self._ping.done() and time.monotonic() - self._pinged > PROBE_S):
                self._ping, self._pinged = self._threads.submit(self.store.ping), time.monotonic()
            ping, end = self._ping, self._pinged + SILENT_S
        while not ping.done() and time.monotonic() < end:
            wait([ping], WAIT_S)
            asker.check()
        return ping.done() and ping.exception() is None

    def _is_away(self, error: Exception) -> None:
        if not self._changes_to(away=True):
            return
        log.warning("S3 is away, taking no jobs", action="store.away", error=str(error))
        self._changed()

    def _is_back(self, attempt: Attempt | None = None, stage: str = "") -> None:
        if attempt is not None and attempt.stage == WAITING:
            self._teller.progress(attempt.job, attempt.token, stage)
        if self._changes_to(away=False):
            log.info("S3 is back", action="store.back")
            self._changed()

    def _changes_to(self, *, away: bool) -> bool:
        with self._lock:
            changes, self.away = self.away != away, away
        return changes

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with self._lock:
            self._trying += 1
        try:
            yield
        finally:
            with self._lock:
                self._trying -= 1

    def _hold(self, size: int) -> None:
        with self._lock:
            self._held += size
        self._changed()

    def _probe(self) -> None:
        while not self._stopping.wait(PROBE_S):
            if not self.away or self._trying:
                continue
            with suppress(ServiceError):
                self.store.ping()
                self._is_back()
