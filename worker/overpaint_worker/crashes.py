"""When is an engine hung, whom does a crash count against, when is the device at fault? It reads no clock."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from overpaint_worker.evidence import IDLE, AtWork
from overpaint_worker.protocol import (
    CPU_STAGE_BUDGET_S,
    CPU_STAGES,
    Loaded,
    Loading,
    NotLoaded,
    Progress,
    Ready,
    ToWorker,
    Unit,
)

LOAD = "load"
ANSWER_S = 60.0
START_S = 180.0
MAX_BARREN = 3
DOUBTED_AFTER = 2
LONGEST_PAUSE_S = 30.0


TEST_JOB = "device-test"
"""The worker's own job, which shows whether the device is at fault. No job of the ledger has this id."""


class Blame(Enum):
    """What the end of an engine says about a job that it had."""

    GUILTY = "guilty"
    """It alone was at work, or it alone missed its deadline."""
    SUSPECT = "suspect"
    """It was at work, and so were others."""
    BESIDE = "beside"
    """It was not at work."""


@dataclass(frozen=True)
class Hang:
    """What took longer than it may, in words, and whose work it was; None: nobody knows."""

    what: str
    jobs: frozenset[str] | None = None

    def __str__(self) -> str:
        return self.what


@dataclass
class InFlight:
    """A job that the engine has, as its messages tell."""

    sent_at: float
    token: int = 0
    """Of the attempt: a worker may get a job back while the engine still ends the attempt before."""
    spec_json: str = ""
    frame: int = 0
    """The number of the frame on the pipe that brought it."""
    stage: str | None = None
    since: float = 0.0
    over: bool = False
    """Its CPU thread has done the stage; it waits for the device."""

    @property
    def on_cpu(self) -> bool:
        """One of the engine's CPU threads has it, beside the device's unit of work."""
        return self.stage in CPU_STAGES and not self.over


@dataclass
class Watch:
    """What one engine process does: its messages tell it, and its evidence tells what it did when it ended.

    All times are of one monotonic clock, in seconds.

    The engine's word for a unit of work is its deadline, so that a load may take minutes and a step may not.
    Where it names none although it has jobs, `answer_s` since its last word is the deadline.
    """

    started_at: float
    start_s: float = START_S
    answer_s: float = ANSWER_S
    cpu_stage_s: float = CPU_STAGE_BUDGET_S
    ready: bool = False
    jobs: dict[str, InFlight] = field(default_factory=dict)
    steps: int = 0
    loading: str | None = None
    """The model that is being loaded."""
    at_work: AtWork | None = None
    """From its evidence, once it has ended; None: that could not be read."""
    _stepped: InFlight | None = None
    _unit: str = IDLE
    _unit_jobs: tuple[str, ...] = ()
    _unit_ends: float = 0.0
    _heard_at: float = 0.0

    def note(self, message: ToWorker, now: float) -> None:
        """Take from a message what it tells about the engine's work."""
        self.heard(now)
        match message:
            case Unit():
                self.unit(message.stage, message.budget_s, message.jobs, now)
            case Progress():
                self.progress(message.job, message.stage, message.step, now, of=message.of)
            case Ready():
                self.ready = True
            case Loading():
                self.loading = message.model
            case Loaded() | NotLoaded():
                self.loading = None

    def heard(self, now: float) -> None:
        """A message came."""
        self._heard_at = now

    def unit(self, stage: str, budget_s: float, jobs: Iterable[str], now: float) -> None:
        """A unit of work began."""
        self._unit, self._unit_jobs, self._unit_ends = stage, tuple(jobs), now + budget_s

    def progress(self, job: str, stage: str, step: int, now: float, of: int = 0) -> None:
        """A job entered a stage, made a step, or has done the stage (`step` of `of`)."""
        over, flight = 0 < of <= step, self.jobs.get(job)
        if flight is not None and (flight.stage, flight.over) != (stage, over):
            flight.stage, flight.since, flight.over = stage, now, over
        if stage == "denoise" and step > 0:
            self.steps, self._stepped = self.steps + 1, flight or self._stepped

    def over(self, job: str, token: int) -> None:
        """The engine has answered for an attempt."""
        if (flight := self.jobs.get(job)) is not None and flight.token == token:
            del self.jobs[job]

    def hang(self, now: float) -> Hang | None:
        """What has taken longer than it may; None if nothing has."""
        if not self.ready:
            late = now > self.started_at + self.start_s
            return Hang(f"no start within {self.start_s:g} s") if late else None
        for job, flight in self.jobs.items():
            if flight.on_cpu and now > flight.since + self.cpu_stage_s:
                what = f"{flight.stage} of job {job} took longer than {self.cpu_stage_s:g} s"
                return Hang(what, frozenset([job]))
        if self._unit != IDLE:
            late = now > self._unit_ends
            return Hang(f"{self._unit} took longer than it may", self._in_unit()) if late else None
        if not self.jobs or any(flight.on_cpu for flight in self.jobs.values()):
            return None
        last = max(self._heard_at, *(flight.sent_at for flight in self.jobs.values()))
        return Hang(f"no word for {self.answer_s:g} s") if now > last + self.answer_s else None

    @property
    def calm(self) -> bool:
        """It is up and loads nothing, so other work on this machine does not delay a job's first step."""
        return self.ready and self._unit != LOAD

    @property
    def rests(self) -> bool:
        """It was up and did nothing, so what ended it came from elsewhere."""
        return self.ready and self.at_work is not None and self.at_work.rests

    @property
    def rendered(self) -> str | None:
        """The model of the last step."""
        return _model_of(self._stepped.spec_json) if self._stepped else None

    @property
    def preloading(self) -> str | None:
        """The model that is being loaded while no job waits for it."""
        return self.loading if self._unit == LOAD and not self._unit_jobs else None

    def _in_unit(self) -> frozenset[str]:
        return frozenset(self._unit_jobs) & self.jobs.keys()

    def suspects(self, hang: Hang | None = None) -> frozenset[str]:
        """The jobs one of which ended the engine: all that its threads were at; of these, whose work hung.

        Where the evidence cannot be read, they are all that it had.
        """
        found = frozenset(job for job, flight in self.jobs.items() if self._was_at(job, flight))
        return found if hang is None or hang.jobs is None else found & hang.jobs

    def _was_at(self, job: str, flight: InFlight) -> bool:
        return self.at_work is None or self.at_work.has((job, flight.token), flight.frame)

    def blame(self, hang: Hang | None = None) -> Mapping[str, Blame]:
        """For each job that the engine had, what its end says about it.

        A job is counted only where it is the one suspect. Several suspects run alone next, so the innocent
        among them are never counted.
        """
        suspects = self.suspects(hang)
        found = Blame.GUILTY if len(suspects) == 1 else Blame.SUSPECT
        return {job: found if job in suspects else Blame.BESIDE for job in self.jobs}

    def models(self, hang: Hang | None = None) -> list[str]:
        """The models of the suspects."""
        specs = [self.jobs[job].spec_json for job in sorted(self.suspects(hang))]
        return [model for model in map(_model_of, specs) if model is not None]


def _model_of(spec_json: str) -> str | None:
    try:
        model = json.loads(spec_json)["model"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return model if isinstance(model, str) else None


@dataclass
class Barren:
    """Counts ends of the engine without a step of any job, and says whether the device is at fault.

    Jobs that kill engines look like a device that kills jobs, and so does a model that kills them when it is
    loaded. So after two such ends the next engine gets a job of the worker's own, if possible with another
    model. If it renders, the device is well. Only ends at the start, in a load without a job where no other
    model could show more, or with that job at work count against the device.
    """

    models: tuple[str, ...] = ()
    """Those that the worker serves."""
    count: int = 0
    in_a_row: int = 0
    doubted: int = 0
    rendered: str | None = None
    """The model that made a step last."""
    deadly: list[str] = field(default_factory=list)
    """The model of each load without a job that ended an engine."""
    _suspects: list[str] = field(default_factory=list)
    """The models that were at work when an engine ended."""
    _tried: list[str] = field(default_factory=list)
    """The models of the tests."""

    def ended(self, watch: Watch, hang: Hang | None = None) -> None:
        """An engine process ended without being asked to."""
        if watch.steps:
            self.rendered = watch.rendered or self.rendered
            self.proven()
            return
        self.in_a_row += 1
        jobs = watch.suspects(hang)
        if TEST_JOB in jobs:
            self.count += 1
        elif jobs or watch.rests:
            self._doubt(watch.models(hang))
        elif (model := watch.preloading) and set(self.models) - {model}:
            self.deadly.append(model)
            self._doubt([model])
        else:
            self.count += 1

    def _doubt(self, models: list[str]) -> None:
        self.doubted += 1
        self._suspects += models

    def proven(self) -> None:
        """The device rendered."""
        self.count = self.in_a_row = self.doubted = 0
        self._suspects, self._tried = [], []

    def next_test(self) -> str | None:
        """The model to test the device with next; None if none is known.

        First those that were tried least, of them the one that rendered last, then one that no job had when
        an engine ended.
        """
        found = min(
            self._known(),
            key=lambda name: (self._tried.count(name), name != self.rendered, name in self._suspects),
            default=None,
        )
        self._tried += [found] if found else []
        return found

    @property
    def untried(self) -> bool:
        """There is a model that the device was not tested with."""
        return any(name not in self._tried for name in self._known())

    def _known(self) -> list[str]:
        return list(dict.fromkeys((*self.models, *self._suspects)))

    def may_load(self, model: str) -> bool:
        """Its load without a job has not ended engines again and again."""
        return self.deadly.count(model) < DOUBTED_AFTER

    @property
    def in_doubt(self) -> bool:
        """The next engine must show that the device is well before it takes jobs."""
        return self.doubted >= DOUBTED_AFTER

    @property
    def give_up(self) -> bool:
        """The device is at fault."""
        return self.count >= MAX_BARREN

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next start: 0 after a crash that came out of work, then 1, 2, 4 ..."""
        return 0.0 if self.in_a_row <= 1 else min(LONGEST_PAUSE_S, 2.0 ** (self.in_a_row - 2))
