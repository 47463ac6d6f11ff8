"""When is an engine hung, whom does a crash count against, when is the device at fault? It reads no clock."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from overpaint_worker.protocol import CPU_STAGE_BUDGET_S, CPU_STAGES, Progress, Ready, ToWorker, Unit

IDLE = "idle"
LOAD = "load"
ANSWER_S = 60.0
START_S = 180.0
MAX_BARREN = 3
LONGEST_PAUSE_S = 30.0


@dataclass
class InFlight:
    """A job that the engine has, as its messages tell."""

    sent_at: float
    token: int = 0
    """Of the attempt: a worker may get a job back while the engine still ends the attempt before."""
    alone: bool = False
    stage: str | None = None
    since: float = 0.0

    @property
    def on_cpu(self) -> bool:
        """One of the engine's CPU threads has it, beside the device's unit of work."""
        return self.stage in CPU_STAGES


@dataclass
class Watch:
    """What one engine process does, told by its messages. All times are of one monotonic clock, in seconds.

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
                self.progress(message.job, message.stage, message.step, now)
            case Ready():
                self.ready = True

    def heard(self, now: float) -> None:
        """A message came."""
        self._heard_at = now

    def unit(self, stage: str, budget_s: float, jobs: Iterable[str], now: float) -> None:
        """A unit of work began."""
        self._unit, self._unit_jobs, self._unit_ends = stage, tuple(jobs), now + budget_s

    def progress(self, job: str, stage: str, step: int, now: float) -> None:
        """A job entered a stage or made a step."""
        if (flight := self.jobs.get(job)) is not None and flight.stage != stage:
            flight.stage, flight.since = stage, now
        self.steps += stage == "denoise" and step > 0

    def over(self, job: str, token: int) -> None:
        """The engine has answered for an attempt."""
        if (flight := self.jobs.get(job)) is not None and flight.token == token:
            del self.jobs[job]

    def hang(self, now: float) -> str | None:
        """In words, what has taken longer than it may; None if nothing has."""
        if not self.ready:
            return f"no start within {self.start_s:g} s" if now > self.started_at + self.start_s else None
        for job, flight in self.jobs.items():
            if flight.on_cpu and now > flight.since + self.cpu_stage_s:
                return f"{flight.stage} of job {job} took longer than {self.cpu_stage_s:g} s"
        if self._unit != IDLE:
            return f"{self._unit} took longer than it may" if now > self._unit_ends else None
        if not self.jobs or any(flight.on_cpu for flight in self.jobs.values()):
            return None
        last = max(self._heard_at, *(flight.sent_at for flight in self.jobs.values()))
        return f"no word for {self.answer_s:g} s" if now > last + self.answer_s else None

    @property
    def calm(self) -> bool:
        """It is up and loads nothing, so other work on this machine does not delay a job's first step."""
        return self.ready and self._unit != LOAD

    def suspects(self) -> frozenset[str]:
        """The jobs a crash counts against: those in the unit of work and on the CPU threads.

        If that is none, then those it has told of, and if that is none too, all: else a job that kills the
        engine before a word of it would never be found.
        """
        at_work = set(self._unit_jobs) if self._unit != IDLE else set()
        at_work |= {job for job, flight in self.jobs.items() if flight.on_cpu}
        told = {job for job, flight in self.jobs.items() if flight.stage is not None}
        return frozenset(at_work & self.jobs.keys() or told or self.jobs)


@dataclass
class Barren:
    """Counts crashes with no step of any job since the engine before; three of them are the device's fault.

    A job that already runs alone because of an earlier crash explains its own: it is given up by the ledger's
    count, and must not take a healthy worker with it.
    """

    count: int = 0
    in_a_row: int = 0

    def ended(self, watch: Watch) -> None:
        """An engine process ended without being asked to."""
        if watch.steps:
            self.count = self.in_a_row = 0
            return
        self.in_a_row += 1
        suspects = watch.suspects()
        if not (suspects and all(watch.jobs[job].alone for job in suspects)):
            self.count += 1

    @property
    def give_up(self) -> bool:
        """The device is at fault."""
        return self.count >= MAX_BARREN

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next start: 0 after a crash that came out of work, then 1, 2, 4 ..."""
        return 0.0 if self.in_a_row <= 1 else min(LONGEST_PAUSE_S, 2.0 ** (self.in_a_row - 2))
