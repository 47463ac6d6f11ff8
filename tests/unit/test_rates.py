"""How fast a queue is, from histories made by hand: seconds without jobs say nothing about it."""

from collections.abc import Mapping

import pytest

from overpaint_shared.ledger.census import rates
from overpaint_shared.ledger.records import QueueState

IDLE: list[Mapping[str, str]] = [{}] * 40
"""Of some minutes."""


def worked(jobs: int, busy_s: float, model: str = "sd15") -> Mapping[str, str]:
    """A slice in which so many jobs ended, and so many seconds with jobs were told."""
    return {model: str(jobs), f"{model}|busy": f"{1e6 * busy_s:.0f}"}


def test_a_pause_of_minutes_leaves_the_rate_as_it_was() -> None:
    before = rates([worked(4, 13.0)], {})
    assert before == {"sd15": pytest.approx(4 / 13)}
    assert rates([worked(4, 13.0), *IDLE], {}) == before
    assert rates([worked(1, 3.25), *IDLE, worked(3, 9.75)], {}) == before


def test_fifty_jobs_after_a_pause_are_minutes_not_half_an_hour() -> None:
    (rate,) = rates([worked(1, 3.25), *IDLE, worked(3, 9.75)], {}).values()
    assert QueueState("sd15", 50, 0.0, 6, rate).eta_s == pytest.approx(162.5)


def test_a_long_job_that_still_runs_counts_with_its_seconds() -> None:
    assert rates([worked(2, 10.0)], {"sd15": 30.0}) == {"sd15": pytest.approx(2 / 40)}


def test_each_model_has_seconds_of_its_own() -> None:
    found = rates([worked(2, 4.0), worked(1, 50.0, "sdxl")], {"sdxl": 50.0})
    assert found == {"sd15": pytest.approx(0.5), "sdxl": pytest.approx(0.01)}


def test_without_an_ended_job_or_its_seconds_there_is_no_rate() -> None:
    assert rates(IDLE, {"sd15": 5.0}) == {}
    assert rates([{"sd15|busy": "7500000"}], {}) == {}
    assert rates([{"sd15": "3"}], {}) == {}
