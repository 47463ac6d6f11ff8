"""A seed's plan."""

from collections import Counter
from functools import cache
from itertools import pairwise

import pytest

from tests.chaos.plan import HOST_ENDS, POISONS, REDIS_AWAY, S3_AWAY, WEIGHTS, Plan, Shape
from tests.chaos.test_chaos import SHAPE

LONG = Shape.long(2000, 300)


@cache
def plan(seed: int, shape: Shape = LONG) -> Plan:
    return Plan.of(seed, shape)


def test_a_seed_gives_the_same_plan_and_another_seed_another() -> None:
    assert Plan.of(3, LONG).to_json() == Plan.of(3, LONG).to_json()
    assert Plan.of(3, LONG).to_json() != Plan.of(4, LONG).to_json()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [SHAPE, LONG], ids=["short", "long"])
def test_every_kind_of_fault_and_of_poison_is_in_every_plan(shape: Shape, seed: int) -> None:
    made = plan(seed, shape)
    assert len(made.faults) == shape.faults
    assert len(made.jobs) == shape.jobs
    assert {fault.kind for fault in made.faults} == set(WEIGHTS)
    assert {job.does for job in made.jobs} == {"render", "fail", "cancel", *POISONS}
    assert [job.number for job in made.jobs] == list(range(shape.jobs))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("away", [REDIS_AWAY, S3_AWAY], ids=["redis", "s3"])
def test_a_server_is_back_before_it_goes_again(seed: int, away: dict[str, int]) -> None:
    times = [(fault.at, fault.at + fault.seconds) for fault in plan(seed).faults if fault.kind in away]
    assert all(ends < begins for (_, ends), (begins, _) in pairwise(times))


@pytest.mark.parametrize("seed", range(5))
def test_enough_hosts_and_engines_end_to_tell_a_percentile(seed: int) -> None:
    kinds = Counter(fault.kind for fault in plan(seed).faults)
    assert sum(kinds[kind] for kind in HOST_ENDS) >= 20
    assert kinds["engine.kill"] >= 20


def test_a_follower_comes_after_the_job_whose_name_it_takes() -> None:
    jobs = plan(1).jobs
    followers = [job for job in jobs if job.after is not None]
    assert len(followers) >= 20
    for job in followers:
        assert job.after is not None
        assert (jobs[job.after].owner, jobs[job.after].key) == (job.owner, job.key)
        assert jobs[job.after].at <= job.at
