"""The engine process as its worker sees it: started, fed, watched, killed and started again.

One thread, the keeper, starts the process, or lets the spare take its place, and reads from it. Another
writes, so that no caller ever waits for a full pipe. A third kills an engine that misses a deadline, and
tends the spare. Those who want a job rendered wait on a future. An engine ends with its worker because its
pipe does, and the kernel ends one that hangs: with the *thread* that started it. So both threads live as long
as the worker.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import structlog

from overpaint_shared.errors import EngineDied, EngineHung, OverpaintError
from overpaint_worker.crashes import TEST_JOB, Barren, Blame, InFlight
from overpaint_worker.device_test import device_test
from overpaint_worker.engine_process import EngineProcess, Launch, status_in_words
from overpaint_worker.protocol import (
    Cancel,
    Cancelled,
    Credits,
    Done,
    Failed,
    Load,
    Loaded,
    Loading,
    NotLoaded,
    Progress,
    ProtocolError,
    Ready,
    Render,
    Stats,
    Stop,
    ToEngine,
    ToWorker,
    encode,
)
from overpaint_worker.spare import Spare

LEAVE_S = 1.0
WATCH_S = 0.1

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Gone:
    """The engine ended while it had the job; what that says about the job."""

    error: EngineDied | EngineHung
    blame: Blame = Blame.BESIDE
    said: str = ""
    """The last lines that it wrote."""


Answer = Done | Failed | Cancelled | Gone


class Listener(Protocol):
    """Who is told what the engine says. Called in the keeper's thread: be quick and raise nothing."""

    def engine_ready(self, ready: Ready) -> None:
        """It takes work."""

    def engine_gone(self) -> None:
        """It takes no work until it is ready again."""

    def engine_progress(self, progress: Progress) -> None:
        """A job got on."""

    def engine_credits(self, slots: int) -> None:
        """It wants to hold so many jobs."""

    def engine_loaded(self, model: str, seconds: float) -> None:
        """A model is on the device."""

    def engine_not_loaded(self, model: str) -> None:
        """A model that it was to load cannot be."""

    def engine_given_up(self, reason: str) -> None:
        """The device is at fault, and no engine is started again."""


class EngineClient:
    """The worker's engine. All methods are thread-safe and return at once."""

    def __init__(
        self, launch: Launch, listener: Listener, *, models: Sequence[str] = (), spare: bool = False
    ) -> None:
        """`models`: what the device can be tested with. `spare`: keep a second process warm, which takes the
        place of one that dies.
        """
        self._launch = launch
        self._spare = Spare(launch) if spare else None
        self._listener = listener
        self._lock = threading.Lock()
        self._futures: dict[tuple[str, int], Future[Answer]] = {}
        self._process: EngineProcess | None = None
        self._closing = threading.Event()
        self._barren = Barren(tuple(models))
        self._testing = False
        self._keeper = threading.Thread(target=self._keep, name="engine-keeper", daemon=True)
        self._watchdog = threading.Thread(target=self._guard, name="engine-watchdog", daemon=True)
        self.stats: Stats | None = None
        self.loaded: tuple[str, ...] = ()
        """The models on the device, used longest ago first."""
        self.had_loaded: tuple[str, ...] = ()
        """Those of the engine before, when it ended."""

    @property
    def pid(self) -> int | None:
        """The process that runs now."""
        process = self._process
        return process.popen.pid if process else None

    def last_words(self) -> str:
        """The last lines that the engine wrote."""
        process = self._process
        return process.output.last_words() if process else ""

    def start(self) -> None:
        """Start the engine; `Listener.engine_ready` tells when it is up."""
        self._keeper.start()
        self._watchdog.start()

    def render(self, job: Render) -> Future[Answer]:
        """Have a job rendered. The future always gets an answer. Raises ProtocolError if it is too large."""
        frame = encode(job)
        future: Future[Answer] = Future()
        with self._lock:
            process = self._process
            if process is None or not process.watch.ready or self._closing.is_set() or self._shut(job):
                future.set_result(Gone(EngineDied("the engine was not up")))
                return future
            self._futures[job.job, job.token] = future
            process.watch.jobs[job.job] = InFlight(
                sent_at=time.monotonic(), token=job.token, spec_json=job.spec_json, frame=process.send(frame)
            )
        return future

    def _shut(self, job: Render) -> bool:
        """While the device is tested, it gets no other job."""
        return self._testing and job.job != TEST_JOB

    def cancel(self, job: str, token: int) -> None:
        """Ask for an attempt to be stopped; its future says when it is."""
        self._send(Cancel(job=job, token=token))

    def forget(self, job: str, token: int) -> None:
        """Have an attempt stopped and wait for nothing: its future answers `Cancelled` now."""
        self._send(Cancel(job=job, token=token))
        self._answer(Cancelled(job=job, token=token))

    def load(self, model: str) -> None:
        """Load a model before a job asks for it; not one whose load ended engines."""
        if self._barren.may_load(model):
            self._send(Load(model=model))
            return
        why = "its load ended the engine more than once"
        log.error("model not loaded", action="model.not_loaded", model=model, error=why)
        self._listener.engine_not_loaded(model)

    def stop(self) -> None:
        """End the engine; what it still has is answered with `Gone`, uncounted."""
        self._closing.set()
        if self._spare:
            self._spare.close()
        self._send(Stop())
        if process := self._process:
            process.leave(LEAVE_S)
        self._end_all(EngineDied("the worker stops"), {})

    # The keeper's thread

    def _keep(self) -> None:
        try:
            self._keep_up()
        except Exception as error:  # else the worker would be listed and never render
            log.exception("unexpected error", action="engine.unexpected")
            self._end_all(EngineDied("its keeper failed"), {})
            self._listener.engine_given_up(f"the engine's keeper failed: {error!r}")

    def _keep_up(self) -> None:
        while not self._closing.is_set():
            try:
                process, spare = self._next_process()
            except OSError as error:  # no such program, or no room for one more process or thread
                self._listener.engine_given_up(f"the engine cannot be started: {error}")
                return
            with self._lock:
                self._process = process
            log.info("engine started", action="engine.started", engine_pid=process.popen.pid, spare=spare)
            try:
                while True:
                    self._heard(process, process.read())
            except (EOFError, OSError, ProtocolError) as error:
                self._ended(process, error)
            except Exception as error:  # without this thread every job here would wait for ever
                log.exception("unexpected error", action="engine.unexpected")
                self._ended(process, error)
            if self._barren.give_up:
                self._listener.engine_given_up(
                    f"the engine ended {self._barren.in_a_row} times without one step"
                )
                return
            self._closing.wait(self._barren.pause_s)

    def _next_process(self) -> tuple[EngineProcess, bool]:
        """The spare, or a new process; whether it was the spare."""
        if self._spare and (process := self._spare.take()):
            return process, True
        return EngineProcess(self._launch), False

    def _heard(self, process: EngineProcess, message: ToWorker) -> None:
        with self._lock:
            process.watch.note(message, time.monotonic())
        match message:
            case Done() | Failed() | Cancelled():
                self._answer(message)
            case Progress():
                self._listener.engine_progress(message)
            case Credits():
                self._listener.engine_credits(message.slots)
            case Ready():
                _log_ready(message)
                self._up(message)
            case _:
                self._noted(message)

    def _up(self, ready: Ready) -> None:
        """It takes work, unless it must show first that its device is not what ended those before."""
        if not self._barren.in_doubt or (model := self._barren.next_test()) is None:
            self._listener.engine_ready(ready)
            return
        self._testing = True
        log.info("device tested", action="engine.testing", model=model)
        test = self.render(device_test(model))
        test.add_done_callback(lambda done: self._tested(ready, model, done.result()))

    def _tested(self, ready: Ready, model: str, answer: Answer) -> None:
        self._testing = False
        if isinstance(answer, Gone):
            return  # its end is counted
        if isinstance(answer, Failed) and self._barren.untried:
            self._up(ready)  # a model that cannot be loaded, say, shows nothing of the device
            return
        self._barren.proven()
        log.warning("device is well, the jobs are at fault", action="engine.tested", model=model)
        self._listener.engine_ready(ready)

    def _noted(self, message: ToWorker) -> None:
        match message:
            case Loading():
                log.info("model loading", action="model.loading", model=message.model)
            case Loaded():
                self.loaded = (*(name for name in self.loaded if name != message.model), message.model)
                log.info("model loaded", action="model.loaded", model=message.model, seconds=message.seconds)
                self._listener.engine_loaded(message.model, message.seconds)
            case NotLoaded():
                why = OverpaintError.from_json(message.error)
                log.error("model not loaded", action="model.not_loaded", model=message.model, error=str(why))
                self._listener.engine_not_loaded(message.model)
            case Stats():
                self.stats, self.loaded = message, tuple(message.models)

    def _ended(self, process: EngineProcess, error: Exception) -> None:
        status = process.reap()
        with self._lock:
            self._process = None
            self.stats, self.had_loaded, self.loaded = None, self.loaded, ()
        if self._closing.is_set():
            return
        self._listener.engine_gone()
        hang = process.hung
        self._barren.ended(process.watch, hang)
        blame = process.watch.blame(hang)
        why: EngineDied | EngineHung
        if hang:
            why = EngineHung(f"the engine hung and was killed: {hang}")
        else:
            said = f": {error}" if isinstance(error, ProtocolError) else ""
            why = EngineDied(f"the engine ended, {status_in_words(status)}{said}")
        log.error(
            str(why),
            action="engine.hung" if hang else "engine.died",
            status=status,
            at_work=sorted(job for job, found in blame.items() if found is not Blame.BESIDE),
        )
        self._end_all(why, blame, process.output.last_words())

    # Futures

    def _answer(self, answer: Done | Failed | Cancelled) -> None:
        with self._lock:
            future = self._futures.pop((answer.job, answer.token), None)
            if future and self._process:
                self._process.watch.over(answer.job, answer.token)
        if future:
            future.set_result(answer)

    def _end_all(self, error: EngineDied | EngineHung, blame: Mapping[str, Blame], said: str = "") -> None:
        with self._lock:
            ended, self._futures = self._futures, {}
        for (job, _), future in ended.items():
            found = blame.get(job, Blame.BESIDE)
            future.set_result(Gone(error, found, "" if found is Blame.BESIDE else said))

    def _send(self, message: ToEngine) -> None:
        with self._lock:
            if self._process:
                self._process.send(encode(message))

    # The watchdog's thread

    def _guard(self) -> None:
        while not self._closing.wait(WATCH_S):
            try:
                self._look()
            except Exception:  # without this thread no hang is found, and the kernel ends the spare
                log.exception("unexpected error", action="engine.unexpected")
                self._closing.wait(LEAVE_S)

    def _look(self) -> None:
        with self._lock:
            process = self._process
            hang = process.watch.hang(time.monotonic()) if process else None
            calm = process is not None and process.watch.calm
        if process and hang and not process.hung:
            process.hung = hang
            process.popen.kill()
        if self._spare:
            self._spare.tend(wanted=calm)


def _log_ready(ready: Ready) -> None:
    log.info(
        "engine ready",
        action="engine.ready",
        engine_pid=ready.pid,
        device=ready.device,
        device_name=ready.device_name,
    )
