"""What takes too long on a CPU thread fails its job, before the watchdog ends the engine."""

import pytest

from overpaint_shared.errors import JobError
from overpaint_worker.engine import time_limit


@pytest.fixture
def clocks(monkeypatch):
    """Seconds that have passed, and seconds that the thread has computed."""
    now = {"wall": 1000.0, "computed": 50.0}
    monkeypatch.setattr(time_limit, "monotonic", lambda: now["wall"])
    monkeypatch.setattr(time_limit, "thread_time", lambda: now["computed"])
    return now


def test_too_much_work_is_refused_with_its_field(clocks):
    with time_limit.limited():
        time_limit.check("mask")
        clocks["wall"] += time_limit.WALL_S
        clocks["computed"] += time_limit.COMPUTED_S
        with pytest.raises(JobError) as caught:
            time_limit.check("mask")
    assert (caught.value.field, caught.value.value) == ("mask", 120.0)
    assert "fewer operations" in caught.value.fix


def test_a_machine_that_stood_still_fails_no_job(clocks):
    with time_limit.limited():
        clocks["wall"] += 3600
        time_limit.check("mask")
        with pytest.raises(JobError):
            time_limit.check("source.image", computed_s=0)


def test_each_part_of_a_job_has_time_of_its_own(clocks):
    with time_limit.limited():
        clocks["wall"], clocks["computed"] = 9000.0, 900.0
    time_limit.check("mask")
    with time_limit.limited():
        time_limit.check("mask")


def test_the_watchdog_waits_longer_than_that():
    from overpaint_worker.engine.decoders import WALL_S
    from overpaint_worker.protocol import CPU_STAGE_BUDGET_S

    assert time_limit.WALL_S + WALL_S < CPU_STAGE_BUDGET_S
