"""The conductor: all jobs of one engine, on one device thread, with CPU threads for picture files.

Each round does units of some job's own work (a load, a text, a part of a VAE) and one turn of the step
loop. Other threads hand things in through an inbox; the device thread alone owns sessions, models and the
loop.
"""

from __future__ import annotations

import os
import queue
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
import torch

from overpaint_shared.errors import OutOfMemory, OverpaintError
from overpaint_worker import protocol as p
from overpaint_worker.engine import time_limit
from overpaint_worker.engine.faults import is_broken_device, judge
from overpaint_worker.engine.loop import Loop, Turn
from overpaint_worker.engine.room import NoRoom, relieve, too_little
from overpaint_worker.engine.session import House, Result, Session, Want
from overpaint_worker.engine.trajectory import Trajectory
from overpaint_worker.evidence import IDLE, Evidence

log = structlog.get_logger(__name__)

BEAT_S: Final = 2.0
"""Seconds between two `Stats`."""
REPEAT_S: Final = 0.1
"""Seconds before an announcement that says nothing new is made again."""
KEPT_FED: Final = 2
"""Jobs that the engine wants to hold beyond the row limit, their pictures ready when a row is free."""

LOAD_BUDGET_S: Final = 1800.0
GPU_BUDGET_S: Final = 120.0
CPU_BUDGET_S: Final = 900.0
"""How long a unit may take: a load many minutes from a slow disk, a pass or a part of a VAE not."""

Emit = Callable[[p.ToWorker], None]
Work = Generator[Want, Any, None]


@dataclass(eq=False)
class _Active:
    """A job on the device."""

    session: Session
    work: Work
    stage: str = ""
    tries: bool = False
    """It waited for room, and has not begun its unit again yet."""


@dataclass
class _Told:
    """What was said last of a job."""

    stage: str = ""
    at: float = 0.0


@dataclass
class _Counts:
    turns: int = 0
    rows: int = 0
    beat_at: float = field(default_factory=time.monotonic)


class Conductor:
    """Runs sessions. `submit`, `cancel`, `load` and `stop` are for any thread, `run` is the device thread.

    Args:
        house: models, limits, device.
        emit: takes each message to the worker; called on this engine's threads, must not block.
        loop: the step loop.
        cpu_threads: for picture files.
        evidence: where each thread notes what it is about to do.

    """

    def __init__(
        self,
        house: House,
        emit: Emit,
        *,
        loop: Loop | None = None,
        cpu_threads: int = 2,
        evidence: Evidence | None = None,
    ) -> None:
        self._evidence = evidence or Evidence()
        self.loop = loop or Loop()
        self.house, self._emit = house, emit
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(cpu_threads, thread_name_prefix="pictures")
        self._held: dict[tuple[str, int], Session] = {}
        self._pending: deque[Session] = deque()
        self._started: list[Session] = []
        self._units: deque[_Active] = deque()
        self._stepping: dict[Trajectory, _Active] = {}
        self._preloads: deque[str] = deque()
        self._parked: list[_Active] = []
        self._short: set[Session] = set()
        """Jobs that wait for room, parked or about to try again. Meanwhile no other job is let in."""
        self._told: dict[tuple[str, int], _Told] = {}
        self._unit: tuple[str, list[str], float] = ("", [], 0.0)
        self._counts = _Counts()
        self._slots = 0
        self._turn_s = 0.0
        self._stopping = False
        self._broken: Exception | None = None
        slow = house.models.device.type == "cpu"
        self._budget_s = CPU_BUDGET_S if slow else GPU_BUDGET_S

    # ------------------------------------------------------------------------------------- any thread

    def submit(self, request: p.Render) -> None:
        """Render this attempt; the end is told by `Done`, `Failed` or `Cancelled`."""
        self._inbox.put(partial(self._arrive, Session(request, self.house)))

    def cancel(self, job: str, token: int) -> None:
        """Stop this attempt; `Cancelled` tells that nothing of it runs any more."""
        self._inbox.put(partial(self._cancel, (job, token)))

    def load(self, model: str) -> None:
        """Load a model before a job asks for it."""
        self._inbox.put(partial(self._preloads.append, model))

    def stop(self) -> None:
        """End `run` before the next unit; what runs is given up."""
        self._inbox.put(self._stop)

    # ----------------------------------------------------------------------------------- device thread

    def run(self) -> None:
        """Work until `stop`. Raises what broke the device, after its jobs were told."""
        with torch.inference_mode():
            self._credit()
            while not self._stopping:
                self._round()
        self.close()

    def run_until_idle(self) -> None:
        """Work until nothing is held: for callers that have only these jobs."""
        with torch.inference_mode():
            self._take(wait=True)
            while self._held and not self._stopping:
                self._round()

    def close(self) -> None:
        """Let the CPU threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _round(self) -> None:
        busy = bool(self._units or self._preloads or self._stepping)
        if not busy:
            self._announce(IDLE, [])
            self._evidence.idle()
        self._take(wait=not busy)
        if self._stopping:
            return
        self._some_units()
        self._one_turn()
        self._beat()
        if self._broken:
            raise self._broken

    def _take(self, *, wait: bool) -> None:
        """Do what other threads have handed in; `wait` for the first of it, at most until the next beat."""
        with suppress(queue.Empty):
            if wait:
                self._inbox.get(timeout=BEAT_S)()
            while True:
                self._inbox.get_nowait()()

    def _stop(self) -> None:
        self._stopping = True

    def _arrive(self, session: Session) -> None:
        self._held[session.name] = session
        self._pending.append(session)
        self._admit()

    def _admit(self) -> None:
        """Start what waits, in order; a job that must run alone waits for all others and lets none in."""
        while self._pending and not self._short:
            head = self._pending[0]
            if self._started and (head.request.alone or self._started[0].request.alone):
                return
            self._pending.popleft()
            self._started.append(head)
            self._on_cpu(head, "prepare", head.prepare, self._prepared)

    def _on_cpu(
        self, session: Session, stage: str, call: Callable[[], Any], then: Callable[[Session, Any], None]
    ) -> None:
        """Run a part of a session on a CPU thread; `then` gets its result on the device thread."""

        def begin() -> Any:
            with self._evidence.working(stage, [session.name]), time_limit.limited():
                self._tell(session, stage, 0, 1)
                try:
                    return call()
                finally:  # the device may be busy for long before it takes the job up
                    self._tell(session, stage, 1, 1)

        def ended(future: Future[Any]) -> None:
            if not future.cancelled():
                self._inbox.put(partial(self._came_back, session, future, then))

        self._pool.submit(begin).add_done_callback(ended)

    def _came_back(self, session: Session, future: Future[Any], then: Callable[[Session, Any], None]) -> None:
        if session.cancelled:
            self._leave(session, p.Cancelled(job=session.name[0], token=session.name[1]))
        elif isinstance(error := future.exception(), Exception):
            self._fail(session, error)
        else:
            then(session, future.result())

    def _prepared(self, session: Session, _: None) -> None:
        self._go_on(_Active(session, session.work(self._model)), None)

    def _model(self, name: str) -> Any:
        in_use = {active.session.spec.model for active in (*self._units, *self._stepping.values())}
        return self.house.models.get(name, in_use, self._on_load)

    def _on_load(self, name: str, seconds: float | None) -> None:
        if seconds is None:
            self._emit(p.Loading(model=name))
        else:
            log.debug("model loaded", action="model_loaded", model=name, seconds=round(seconds, 3))
            self._emit(p.Loaded(model=name, seconds=seconds))

    def _go_on(self, active: _Active, value: Any) -> None:
        """Do the job's next unit, and find it its next place."""
        session = active.session
        try:
            with self._evidence.working(active.stage or "prepare", [session.name]):
                want = active.work.send(value)
        except StopIteration:
            self._on_cpu(session, "store", session.finish, self._finished)
            self._unpark()
        except Exception as error:
            self._fail(session, error)
        else:
            if isinstance(want, NoRoom):
                self._find_room(active, want)
                return
            self._has_room(active)
            if isinstance(want, str):
                # What has begun goes on before what has not, so that it joins the loop, or leaves, soonest.
                place = self._units.appendleft if active.stage else self._units.append
                active.stage = want
                self._tell(session, want, 0, 1)
                place(active)
            elif not isinstance(want, Trajectory):
                self._on_cpu(session, "prepare", want, lambda _, value: self._go_on(active, value))
            elif want.want is None:  # no steps: the latent stays as it is
                self._go_on(active, want.result)
            else:
                self._stepping[want] = active
                self.loop.add(want)
                self._tell(session, "denoise", 0, want.steps)

    def _find_room(self, active: _Active, want: NoRoom) -> None:
        """Give up what is idle for a job; else let it wait until other jobs have left the device."""
        session = active.session
        self._short.add(session)
        active.tries = True
        if self._relieve(session):
            self._go_on(active, None)
        elif len(self._started) > len(self._parked) + 1:  # a job that stores its picture holds memory, too
            log.info("job waits for memory", action="job_parked", job=session.name[0], why=want.what)
            self._parked.append(active)
        else:
            active.work.close()
            self._fail(session, too_little(self.house, want, session.names))

    def _has_room(self, active: _Active) -> None:
        """It got on. After it waited for room, its unit is announced again first, and only done then."""
        if active.tries:
            active.tries = False
        elif active.session in self._short:
            self._short.remove(active.session)
            self._admit()

    def _relieve(self, session: Session | None = None) -> bool:
        """Give up the weights that no job on the device, nor `session`, uses; whether there were any."""
        here = [active.session for active in (*self._units, *self._stepping.values(), *self._parked)]
        return relieve(self.house, {name for each in (*here, session) if each for name in each.names})

    def _unpark(self) -> None:
        """Something has left the device: those that wait for room try again, first come first."""
        parked, self._parked = self._parked, []
        self._units.extendleft(reversed(parked))

    def _some_units(self) -> None:
        """One unit, and while jobs step, as many as fit the time of their last turn: half the device each."""
        until = time.monotonic() + (self._turn_s if self._stepping else 0.0)
        self._one_unit()
        while self._units and time.monotonic() < until:
            self._one_unit()

    def _one_unit(self) -> None:
        if self._preloads:
            self._preload(self._preloads.popleft())
        elif self._units:
            active = self._units.popleft()
            self._announce(active.stage, [active.session.name[0]])
            self._go_on(active, None)

    def _preload(self, name: str) -> None:
        self._announce("load", [])
        error = self._loads(name)
        if error is not None and error["code"] == OutOfMemory.code and self._relieve():
            error = self._loads(name)
        if error is not None:
            why = str(OverpaintError.from_json(error))
            log.warning("model does not load", action="model_refused", model=name, error=why)
            self._emit(p.NotLoaded(model=name, error=error))

    def _loads(self, name: str) -> dict[str, Any] | None:
        """Load a model; why it cannot be, as JSON, since an exception's frames would keep memory."""
        try:
            with self._evidence.working("load"):
                self._model(name)
        except Exception as error:
            return judge(error)[1].to_json()
        return None

    def _one_turn(self) -> None:
        group = self.loop.group()
        if not group:
            return
        self._announce("denoise", [trajectory.job for trajectory in group])
        began = time.monotonic()
        with self._evidence.working("denoise", [self._stepping[each].session.name for each in group]):
            turn = self.loop.turn(group)
        self._turn_s = time.monotonic() - began
        self._counts.turns += turn.passes
        self._counts.rows += turn.rows
        self._after(turn)
        self._credit()

    def _after(self, turn: Turn) -> None:
        for trajectory in turn.served:
            session, company = self._stepping[trajectory].session, len(turn.served)
            self._tell(session, "denoise", trajectory.step, trajectory.steps, company)
        for trajectory in turn.finished:
            self._go_on(self._stepping.pop(trajectory), trajectory.result)
        for trajectory, error in turn.failed:
            self._fail(self._stepping.pop(trajectory).session, error)

    def _finished(self, session: Session, result: Result) -> None:
        job, token = session.name
        self._leave(session, p.Done(job=job, token=token, files=result.files, summary=result.summary))

    def _fail(self, session: Session, error: Exception) -> None:
        kind, told = judge(error)
        log.debug("job failed", action="job_failed", job=session.name[0], kind=kind, error=str(told))
        job, token = session.name
        self._leave(session, p.Failed(job=job, token=token, error=told.to_json(), kind=kind))
        if is_broken_device(error):
            self._broken = error

    def _cancel(self, name: tuple[str, int]) -> None:
        session = self._held.get(name)
        if session is None:
            return  # its end was told already
        session.cancelled = True
        if session in self._pending or self._take_off(session):
            self._leave(session, p.Cancelled(job=name[0], token=name[1]))
        # else a CPU thread has it, and tells when it comes back

    def _take_off(self, session: Session) -> bool:
        """Take a job off the device, between its units; false if it is not there."""
        for place in (self._units, self._parked):
            for active in place:
                if active.session is session:
                    place.remove(active)
                    active.work.close()
                    return True
        for trajectory, active in self._stepping.items():
            if active.session is session:
                del self._stepping[trajectory]
                self.loop.remove(trajectory)
                active.work.close()
                return True
        return False

    def _leave(self, session: Session, last_word: p.Done | p.Failed | p.Cancelled) -> None:
        del self._held[session.name]
        self._told.pop(session.name, None)
        for where in (self._started, self._pending):
            if session in where:
                where.remove(session)
        self._emit(last_word)
        self._short.discard(session)
        self._unpark()
        self._admit()

    # ------------------------------------------------------------------------------------------ telling

    def _tell(self, session: Session, stage: str, step: int, of: int, company: int = 1) -> None:
        """Progress; of a stage's many steps the first, the last, and some between."""
        told, now = self._told.setdefault(session.name, _Told()), time.monotonic()
        news = stage != told.stage or step in (1, of)
        if news or now - told.at >= REPEAT_S:
            told.stage, told.at = stage, now
            job, token = session.name
            self._emit(p.Progress(job=job, token=token, stage=stage, step=step, of=of, company=company))

    def _announce(self, stage: str, jobs: list[str]) -> None:
        now = time.monotonic()
        before, before_jobs, at = self._unit
        if (stage, jobs) == (before, before_jobs) and (stage == IDLE or now - at < REPEAT_S):
            return
        self._unit = (stage, jobs, now)
        budget = {IDLE: 0.0, "load": LOAD_BUDGET_S}.get(stage, self._budget_s)
        self._emit(p.Unit(stage=stage, budget_s=budget, jobs=jobs))

    def _credit(self) -> None:
        """Slots follow the row limit: a job with guidance takes two rows."""
        slots = max(self.loop.limits.largest() // 2, 1) + KEPT_FED
        if slots != self._slots:
            self._slots = slots
            self._emit(p.Credits(slots=slots))

    def _beat(self) -> None:
        if time.monotonic() - self._counts.beat_at < BEAT_S:
            return
        self._counts.beat_at = time.monotonic()
        self._emit(
            p.Stats(
                live=len(self._stepping), held=len(self._held),
                turns=self._counts.turns, rows=self._counts.rows,
                memory_used=_memory_used(self.house.models.device), models=self.house.models.loaded,
                row_limit=self.loop.limits.largest(),
            )
        )  # fmt: skip


def _memory_used(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0
