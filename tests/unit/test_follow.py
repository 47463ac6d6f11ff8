"""What is told of followed jobs, whatever order it comes in."""

import pytest

from overpaint_producer.follow import POLL_BATCH, POLL_S, _Watch
from overpaint_shared.ledger import Event, JobState


def event(
    state: JobState = JobState.RUNNING, step: int = 0, stage: str | None = "denoise", attempt: int = 1
) -> Event:
    return Event(job_id="a", state=state, stage=stage, step=step, of=20, attempt=attempt)


def told(*events: Event) -> list[Event]:
    watch = _Watch(["a", "b"], deadline=None)
    return [news for each in events for news in watch.news(each)]


def test_the_same_is_told_once() -> None:
    assert told(event(step=3), event(step=3), event(step=4)) == [event(step=3), event(step=4)]


def test_an_event_that_waited_in_a_buffer_does_not_turn_a_job_back() -> None:
    assert told(event(step=9), event(step=8), event(step=10)) == [event(step=9), event(step=10)]


def test_nothing_is_told_of_a_job_that_has_ended() -> None:
    done = event(JobState.DONE)
    assert told(event(step=3), done, event(step=4), done) == [event(step=3), done]


def test_a_job_that_begins_anew_is_told() -> None:
    again = event(step=1, attempt=2)
    assert told(event(step=9), event(JobState.QUEUED, stage=None), again, event(step=10))[-1] == again


def test_a_job_that_nobody_asked_for_is_not_told() -> None:
    stranger = Event(job_id="x", state=JobState.DONE)
    assert told(stranger) == []


def test_waiting_has_an_end() -> None:
    with pytest.raises(TimeoutError, match="2 of 2 jobs"):
        _Watch(["a", "b"], deadline=0.0).patience_s()


def test_of_thousands_that_wait_a_few_are_looked_up_now_and_then_and_first_those_that_run() -> None:
    watch = _Watch([f"j{number}" for number in range(20_000)], deadline=None)
    for job_id in watch.ids:
        list(watch.news(Event(job_id=job_id, state=JobState.QUEUED)))
    list(watch.news(Event(job_id="j19999", state=JobState.RUNNING, attempt=1)))
    watch.heard = dict.fromkeys(watch.ids, 0.0)
    looked = watch.silent()
    assert looked[0] == "j19999"
    assert len(looked) == POLL_BATCH
    assert watch.silent() == [], "not again at once"
    assert POLL_BATCH / POLL_S < 50
