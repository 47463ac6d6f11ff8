"""What a seed stands for: the jobs and when they are submitted, the faults and when they happen. Pure.

Time goes in cycles: a storm, in which servers break, then a calm, in which they do not. When a host ends
early in a calm, nothing but the lease holds up its jobs.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Final

OWNERS: Final = ("ann", "ben", "cat")
MODELS: Final = ("alpha", "beta")
REAL_MODEL: Final = "mini"
PRIORITIES: Final = (0, 3, 5, 5, 5, 9)
PICTURES: Final = 24
POISONS: Final = ("kill", "kill_first", "hang", "decode")
"""What takes an engine down: at a step, before a word of it, by hanging in a step or in a decoder."""

ON_HOSTS: Final = {
    "host.kill": 9, "worker.kill": 4, "worker.freeze": 3, "worker.sleep": 4, "worker.stop": 5,
    "engine.kill": 13, "engine.hang": 5, "engine.spare": 3,
}  # fmt: skip
REDIS_AWAY: Final = {
    "redis.kill": 3, "redis.stop": 2, "redis.freeze": 2, "redis.readonly": 2, "redis.noreplicas": 2,
    "redis.full": 2, "redis.rewrite_kill": 2,
}  # fmt: skip
S3_AWAY: Final = {"s3.kill": 3, "s3.freeze": 3, "s3.stop": 2}
AT_ONCE: Final = {
    "redis.rewrite": 3, "redis.forget": 2, "redis.cut": 3, "message.drop": 6, "message.double": 6,
    "message.hostile": 5, "ledger.odd": 5, "submit.cut": 6, "job.cancel": 8, "job.replay": 3, "gc": 3,
}  # fmt: skip
WEIGHTS: Final = ON_HOSTS | REDIS_AWAY | S3_AWAY | AT_ONCE
"""Every kind of fault, and how often it comes relative to the others."""
HOST_ENDS: Final = ("host.kill", "worker.kill")
WITH_JOBS: Final = {"submit.cut": 1, "job.cancel": 1, "gc": 3}
"""Faults that take jobs of the plan, and how many."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much, how fast, and how patient the farm is."""

    jobs: int
    faults: int
    real_jobs: int = 0
    seconds: float
    lease_s: float
    storm_s: float
    calm_s: float
    away_s: tuple[float, float]
    """How long a server is away, at least and at most."""
    end_s: float
    """How long after the last fault the last job may end: a poison is found out four times over."""
    without: tuple[str, ...] = ()
    """Kinds of faults that are left out, to look into the others."""

    @classmethod
    def long(cls, jobs: int, faults: int) -> "Shape":
        """With the leases that the settings have where nobody says otherwise: a fault every two seconds."""
        return cls(
            jobs=jobs,
            faults=faults,
            real_jobs=jobs // 40,
            seconds=max(80.0, 1.8 * faults),
            lease_s=20.0,
            storm_s=30.0,
            calm_s=50.0,
            away_s=(2.0, 5.0),
            end_s=180.0,
        )

    @classmethod
    def short(cls, jobs: int, faults: int) -> "Shape":
        """With a lease of three seconds."""
        return cls(
            jobs=jobs,
            faults=faults,
            seconds=1.4 * faults,
            lease_s=3.0,
            storm_s=12.0,
            calm_s=16.0,
            away_s=(0.8, 2.0),
            end_s=60.0,
        )


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One job, when it is submitted, and what it does to its engine."""

    number: int
    at: float
    does: str = "render"
    """`render`, one of POISONS, `fail`, or `cancel`: it is long, and a fault cancels it."""
    via: str = "producer"
    """`producer`; `uploaded`, `recorded`: the first producer is killed then; `named`: by `sha256:`."""
    owner: str
    model: str
    priority: int
    steps: int
    step_s: float
    picture: int
    key: str | None = None
    after: int | None = None
    """The job that must have ended before, which has the same key."""

    @property
    def innocent(self) -> bool:
        """Whether it must end as done."""
        return self.does == "render"

    @property
    def real(self) -> bool:
        """Whether the real engine renders it."""
        return self.model == REAL_MODEL

    @property
    def token(self) -> str:
        """Its submit token."""
        return f"chaos-{self.number}"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: `seconds` until it is undone (0: nothing is to undo), `pick` chooses among what is there."""

    number: int
    at: float
    kind: str
    seconds: float = 0.0
    pick: float
    jobs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All of it."""

    seed: int
    shape: Shape
    jobs: tuple[PlannedJob, ...]
    faults: tuple[Fault, ...] = field(repr=False)

    @classmethod
    def of(cls, seed: int, shape: Shape) -> "Plan":
        """The plan of a seed: the same for the same shape, whatever machine it runs on."""
        dice = Random(f"{seed} {shape}")
        jobs = list(_jobs(dice, shape))
        faults = _faults(dice, shape)
        faults = [_with_jobs(dice, fault, jobs) for fault in faults]
        return cls(seed, shape, tuple(jobs), tuple(sorted(faults, key=lambda fault: fault.at)))

    def to_json(self) -> str:
        """For a person who looks into it."""
        return json.dumps(asdict(self), indent=1)


# Jobs


def _jobs(dice: Random, shape: Shape) -> Iterator[PlannedJob]:
    """Some come one by one, some in bursts; the last come before the faults end."""
    moments = sorted(dice.uniform(0, shape.seconds * 0.95) for _ in range(shape.jobs // 3 + 1))
    times = sorted(dice.choice(moments) + dice.uniform(0, 0.3) for _ in range(shape.jobs))
    real = set(dice.sample(range(shape.jobs), shape.real_jobs))
    does = _misdeeds(dice, shape, times, real)
    first: PlannedJob | None = None
    for number, at in enumerate(times):
        made = (
            _real(dice, number, at) if number in real else _one(dice, number, at, does.get(number, "render"))
        )
        if made.innocent and not made.real and dice.random() < 0.08:
            if first is None:
                first = made = replace(made, key=f"kept/{number}.png")
            else:
                made = replace(made, key=first.key, owner=first.owner, after=first.number)
                first = None
        yield made


def _one(dice: Random, number: int, at: float, does: str) -> PlannedJob:
    steps = dice.choice((1, 2, 4, 8, 12, 20))
    return PlannedJob(
        number=number,
        at=at,
        does=does,
        owner=dice.choice(OWNERS),
        model=dice.choice(MODELS),
        priority=dice.choice(PRIORITIES),
        steps=max(3, steps) if does != "render" else steps,
        step_s=dice.choice((0.02, 0.05, 0.05, 0.1)),
        picture=dice.randrange(PICTURES),
    )


def _misdeeds(dice: Random, shape: Shape, times: Sequence[float], real: Collection[int]) -> dict[int, str]:
    """Which jobs are poison, one of each kind at least, and which fail. All are early: it takes time."""
    early = [number for number, at in enumerate(times) if at < shape.seconds * 0.7 and number not in real]
    poisons, failing = max(len(POISONS), shape.jobs // 60), max(1, shape.jobs // 100)
    chosen = dice.sample(early, poisons + failing)
    return {
        number: POISONS[place % len(POISONS)] if place < poisons else "fail"
        for place, number in enumerate(chosen)
    }


def _real(dice: Random, number: int, at: float) -> PlannedJob:
    """Few pictures, so that the fault-free ones are soon rendered."""
    return PlannedJob(
        number=number,
        at=at,
        owner=dice.choice(OWNERS),
        model=REAL_MODEL,
        priority=dice.choice(PRIORITIES),
        steps=dice.choice((4, 8)),
        step_s=0.0,
        picture=dice.randrange(2),
    )


# Faults


def kinds(shape: Shape, dice: Random) -> Counter[str]:
    """How often each kind comes: by its weight, and once at least where the faults suffice."""
    weights = {kind: weight for kind, weight in WEIGHTS.items() if kind not in shape.without}
    if shape.faults < len(weights):
        return Counter(dice.sample(sorted(weights), shape.faults))
    total, left = sum(weights.values()), shape.faults - len(weights)
    counts = Counter({kind: 1 + int(left * weight / total) for kind, weight in weights.items()})
    counts.update(dice.choices(list(weights), list(weights.values()), k=shape.faults - counts.total()))
    return counts


def _faults(dice: Random, shape: Shape) -> list[Fault]:
    counts = kinds(shape, dice)
    redis = [kind for kind in REDIS_AWAY for _ in range(counts[kind])]
    s3 = [kind for kind in S3_AWAY for _ in range(counts[kind])]
    rest = [kind for kind in ON_HOSTS | AT_ONCE for _ in range(counts[kind])]
    found: list[tuple[float, str, float]] = []
    for away in (redis, s3):
        dice.shuffle(away)
        found += [
            (at, kind, seconds)
            for kind, (at, seconds) in zip(away, _outages(dice, shape, len(away)), strict=True)
        ]
    found += [(_moment(dice, shape, kind), kind, _seconds(dice, shape, kind)) for kind in rest]
    return [
        Fault(number=number, at=at, kind=kind, seconds=seconds, pick=dice.random())
        for number, (at, kind, seconds) in enumerate(sorted(found))
    ]


def _cycles(shape: Shape) -> list[float]:
    """When each storm begins."""
    length = shape.storm_s + shape.calm_s
    return [number * length for number in range(max(1, int(shape.seconds / length)))]


def _outages(dice: Random, shape: Shape, count: int) -> list[tuple[float, float]]:
    """When a server goes and for how long: in storms, one after the other."""
    storms = _cycles(shape)
    share = [count // len(storms) + (number < count % len(storms)) for number in range(len(storms))]
    found = []
    for begins, here in zip(storms, share, strict=True):
        slot = shape.storm_s / max(1, here)
        for number in range(here):
            seconds = min(dice.uniform(*shape.away_s), 0.6 * slot)
            found.append((begins + number * slot + dice.uniform(0, 0.3 * slot), seconds))
    return found


def _moment(dice: Random, shape: Shape, kind: str) -> float:
    if kind in HOST_ENDS and dice.random() < 0.75:
        begins = dice.choice(_cycles(shape)) + shape.storm_s
        return begins + dice.uniform(2.0, shape.calm_s / 2 - 2)
    return dice.uniform(1.0, shape.seconds)


def _seconds(dice: Random, shape: Shape, kind: str) -> float:
    if kind == "worker.freeze":  # beyond its lease
        return shape.lease_s * dice.uniform(1.2, 1.6)
    return dice.uniform(0.5, shape.lease_s / 2) if kind == "worker.sleep" else 0.0


def _with_jobs(dice: Random, fault: Fault, jobs: list[PlannedJob]) -> Fault:
    """The fault, with the jobs that it takes; those are changed in the list."""
    wanted = WITH_JOBS.get(fault.kind, 0)
    free = sorted((job for job in jobs if _free(job)), key=lambda job: abs(job.at - fault.at))[:wanted]
    for job in free:
        jobs[job.number] = _taken(dice, fault, job)
    return replace(fault, jobs=tuple(job.number for job in free))


def _free(job: PlannedJob) -> bool:
    return job.innocent and not job.real and job.via == "producer" and job.key is None


def _taken(dice: Random, fault: Fault, job: PlannedJob) -> PlannedJob:
    if fault.kind == "submit.cut":
        return replace(job, via=dice.choice(("uploaded", "recorded")), at=fault.at)
    if fault.kind == "gc":
        return replace(job, via="named", at=fault.at)
    return replace(job, does="cancel", at=max(0.0, fault.at - dice.uniform(0, 2)), steps=60, step_s=0.1)
