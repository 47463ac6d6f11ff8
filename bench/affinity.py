"""What queue affinity saves: model loads per 1,000 mixed jobs, against taking from all queues in turn.

    python bench/affinity.py [--jobs 1000] [--workers 4] [--models 3] [--load-s 20] [--job-s 4] [--json]

A simulation: no Redis, no engine, no device; time is a number. The rule is not rebuilt here: it is the
worker's own `Intake` (worker/overpaint_worker/cycle.py) with the simulation's clock. The baseline is what a
Celery worker does by itself: kombu's round robin over the queues of all models, as many messages as it has
slots. To be fair to it, its engine renders what it holds of the model on the device before it loads another.

Jobs come at random (Poisson), their models are drawn unevenly (the second half as often as the first, the
third a third ...), and all of them keep the workers busy for `--load` of the time, loads not counted. A
worker renders one job after another (`--job-s` each: batches make jobs quicker alike under both rules) and
loads a model that is not among the `--resident` used last (`--load-s`).
"""

import argparse
import heapq
import json
import random
import statistics
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from kombu.utils.scheduling import round_robin_cycle

from overpaint_worker.cycle import SWITCH_AFTER_S, Intake


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is simulated."""

    jobs: int = 1000
    workers: int = 4
    models: int = 3
    slots: int = 6
    resident: int = 1
    load_s: float = 20.0
    job_s: float = 4.0
    load: float = 0.7
    switch_after_s: float = SWITCH_AFTER_S
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One job, by the queue of its model."""

    queue: str
    came: float


@dataclass(frozen=True)
class Found:
    """What came of one rule."""

    rule: str
    loads_per_1000: float
    mean_wait_s: float
    p95_wait_s: float
    longest_wait_s: float
    took_s: float


@dataclass
class World:
    """The clock and the queues, shared by all workers."""

    now: float = 0.0
    queues: dict[str, deque[Job]] = field(default_factory=dict)

    def waited(self) -> dict[str, float]:
        """How long the oldest of each queue has waited."""
        return {queue: self.now - jobs[0].came for queue, jobs in self.queues.items() if jobs}


class Worker:
    """Holds jobs of at most `slots`, renders one at a time. The rule is `_order`."""

    rule = ""

    def __init__(self, plan: Plan, world: World) -> None:
        self.plan, self.world = plan, world
        self.held: list[Job] = []
        self.busy = False
        self.loads = 0
        self._warm: OrderedDict[str, None] = OrderedDict()

    def order(self) -> Sequence[str]:
        """The queues that the next message may come from, in order."""
        raise NotImplementedError

    def took(self, queue: str) -> None:
        """A message came from there."""

    def fill(self) -> None:
        """Take what the rule allows."""
        while (queue := next((q for q in self.order() if self.world.queues[q]), None)) is not None:
            self.took(queue)
            self.held.append(self.world.queues[queue].popleft())

    def begin(self) -> tuple[Job, float] | None:
        """The job to render next, and for how long the device is busy with it; None if there is none."""
        if self.busy or not self.held:
            return None
        job = next((job for job in self.held if job.queue in self._warm), self.held[0])
        self.busy = True
        return job, self._ready(job.queue) + self.plan.job_s

    def _ready(self, queue: str) -> float:
        load_s = 0.0
        if queue not in self._warm:
            self.loads, load_s = self.loads + 1, self.plan.load_s
            while len(self._warm) >= self.plan.resident:
                self._warm.popitem(last=False)
        self._warm[queue] = None
        self._warm.move_to_end(queue)
        return load_s

    def end(self, job: Job) -> None:
        """It is done."""
        self.held.remove(job)
        self.busy = False


class Affine(Worker):
    """The worker's own rule."""

    rule = "affinity"

    def __init__(self, plan: Plan, world: World) -> None:
        super().__init__(plan, world)
        self.intake = Intake(
            {queue: queue for queue in world.queues},
            slots=plan.slots,
            held=lambda: len(self.held),
            switch_after_s=plan.switch_after_s,
            clock=lambda: world.now,
        )
        self.intake.engine_up = True

    def order(self) -> Sequence[str]:
        """What the intake chooses."""
        self.intake.waiting = self.world.waited()
        return self.intake.choose(list(self.world.queues))

    def took(self, queue: str) -> None:
        """Tell the intake."""
        self.intake.taken(queue)


class RoundRobin(Worker):
    """kombu's own order."""

    rule = "round robin"

    def __init__(self, plan: Plan, world: World) -> None:
        super().__init__(plan, world)
        self._cycle = round_robin_cycle(list(world.queues))

    def order(self) -> Sequence[str]:
        """All queues in their cycle's order, none when full."""
        if len(self.held) >= self.plan.slots:
            return []
        return list(self._cycle.consume(len(self.world.queues)))

    def took(self, queue: str) -> None:
        """Its turn is over."""
        self._cycle.rotate(queue)


def arrivals(plan: Plan) -> Iterator[Job]:
    """Jobs in the order they come."""
    dice = random.Random(plan.seed)  # noqa: S311  # seeded, so that a figure can be had again
    names = [f"m.{number}" for number in range(plan.models)]
    weights = list(accumulate(1 / (number + 1) for number in range(plan.models)))
    per_s = plan.load * plan.workers / plan.job_s
    at = 0.0
    for _ in range(plan.jobs):
        at += dice.expovariate(per_s)
        yield Job(dice.choices(names, cum_weights=weights)[0], at)


def simulate(plan: Plan, kind: type[Worker]) -> Found:
    """Run the plan under one rule to the end of its last job."""
    jobs = list(arrivals(plan))
    world = World(queues={f"m.{number}": deque() for number in range(plan.models)})
    workers = [kind(plan, world) for _ in range(plan.workers)]
    events: list[tuple[float, int, Worker | None, Job]] = [
        (job.came, number, None, job) for number, job in enumerate(jobs)
    ]
    heapq.heapify(events)
    waits, number = [], len(jobs)
    while events:
        world.now, _, worker, job = heapq.heappop(events)
        if worker is None:
            world.queues[job.queue].append(job)
        else:
            worker.end(job)
            waits.append(world.now - plan.job_s - job.came)
        # Whoever holds least is quickest at the queue.
        for each in sorted(workers, key=lambda w: len(w.held)):
            each.fill()
            if begun := each.begin():
                number += 1
                heapq.heappush(events, (world.now + begun[1], number, each, begun[0]))
    assert len(waits) == plan.jobs
    return Found(
        rule=kind.rule,
        loads_per_1000=round(1000 * sum(worker.loads for worker in workers) / plan.jobs, 1),
        mean_wait_s=round(statistics.fmean(waits), 1),
        p95_wait_s=round(statistics.quantiles(waits, n=20)[-1], 1),
        longest_wait_s=round(max(waits), 1),
        took_s=round(world.now, 1),
    )


def main() -> None:
    """Simulate both rules and print what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    defaults = Plan()
    for name in Plan.__dataclass_fields__:
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    found = [simulate(Plan(**given), kind) for kind in (RoundRobin, Affine)]
    if as_json:
        print(json.dumps({"plan": given, "found": [each.__dict__ for each in found]}))
        return
    print("rule          loads/1,000   mean wait   95 % wait     longest   all done")
    for each in found:
        print(
            f"{each.rule:<12}{each.loads_per_1000:>13}{each.mean_wait_s:>10} s{each.p95_wait_s:>10} s"
            f"{each.longest_wait_s:>10} s{each.took_s:>9} s"
        )


if __name__ == "__main__":
    main()
