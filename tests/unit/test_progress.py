"""What people see of running jobs: the arithmetic, the plain lines, the bars."""

import io

import pytest
from rich.console import Console

from overpaint_producer.pace import Pace, clock, speed
from overpaint_producer.progress import Bars, Lines, _progress
from overpaint_shared.ledger import Event, JobState


class Clock:
    """A time that tests move; events made now bear it."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def running(job: str, step: int, of: int = 20, at: float = 100.0) -> Event:
    return Event(job_id=job, state=JobState.RUNNING, stage="denoise", step=step, of=of, attempt=1, at=at)


def ended(job: str, state: JobState = JobState.DONE, at: float = 100.0) -> Event:
    return Event(job_id=job, state=state, attempt=1, at=at)


def test_a_pace_tells_rate_and_time_left() -> None:
    pace = Pace()
    for second in range(5):
        pace.tell(second, second * 2, 20)
    assert pace.rate() == pytest.approx(2.0)
    assert pace.left_s() == pytest.approx(6.0)


def test_a_pace_forgets_what_is_long_ago() -> None:
    pace = Pace()
    for second in range(100):
        pace.tell(second, second * 10, 2000)
    for second in range(100, 200):
        pace.tell(second, 990 + (second - 99), 2000)
    assert pace.rate() == pytest.approx(1.0)


def test_a_pace_begins_anew_when_the_count_falls() -> None:
    pace = Pace()
    for at, count in ((0, 5), (1, 10), (2, 0)):
        pace.tell(at, count, 20)
    assert pace.rate() is None
    assert pace.left_s() is None


@pytest.mark.parametrize(("seconds", "text"), [(None, "-:--"), (0, "0:00"), (65, "1:05"), (3725, "1:02:05")])
def test_times_are_short(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(None, ""), (3.21, "3.2 steps/s"), (0.25, "4.0 s/step")])
def test_speeds_say_the_larger_number(rate: float | None, text: str) -> None:
    assert speed(rate, "step") == text


def test_a_few_jobs_have_a_line_for_each_change() -> None:
    out, now = io.StringIO(), Clock()
    with Lines(["a", "b"], out, now) as lines:
        lines.show(ended("a", JobState.QUEUED))
        for step in range(1, 21):
            lines.show(running("a", step))
        lines.show(ended("a"))
        lines.show(ended("b", JobState.FAILED))
    said = out.getvalue().splitlines()
    assert said[0] == "a queued"
    assert said[-2:] == ["a done", "b failed"]
    assert "a running denoise 10/20" in said
    assert len(said) == 3 + 11  # a tenth at a time


def test_many_jobs_have_a_summary_now_and_then_and_failures_at_once() -> None:
    out, now = io.StringIO(), Clock()
    ids = [f"j{number}" for number in range(1000)]
    with Lines(ids, out, now) as lines:
        for job in ids[:100]:
            now.at += 0.125
            lines.show(running(job, 1))
            lines.show(ended(job, at=now.at))
        lines.show(ended("j500", JobState.FAILED, now.at))
    said = out.getvalue().splitlines()
    assert "j500 failed" in said
    assert said[-1].startswith("101/1000 ended: 100 done, 1 failed, 899 waiting")
    assert "8.1 jobs/s, 1:51 left" in said[-1]
    assert len(said) == 4


def screen(bars: Bars, console: Console) -> list[str]:
    with console.capture() as shot:
        console.print(bars._progress.get_renderable())
    return [line for line in shot.get().splitlines() if line.strip()]


@pytest.fixture
def console() -> Console:
    return Console(width=120, height=12, force_terminal=True, color_system=None, file=io.StringIO())


def test_a_single_job_has_one_bar_from_waiting_to_done(console: Console) -> None:
    now = Clock()
    bars = Bars(["a"], {"a": "a tiny [red]img2img"}.get, _progress(console))
    (line,) = screen(bars, console)
    assert "waiting" in line
    for step in range(1, 9):
        now.at += 0.5
        bars.show(running("a", step, at=now.at))
    (line,) = screen(bars, console)
    assert "a tiny [red]img2img" in line  # a title is never markup
    assert "denoise 8/20" in line
    assert "2.0 steps/s" in line
    assert "0:06" in line
    bars.show(ended("a"))
    (line,) = screen(bars, console)
    assert "done" in line


def test_a_thousand_jobs_fit_a_small_terminal(console: Console) -> None:
    ids = [f"j{number}" for number in range(1000)]
    now = Clock()
    bars = Bars(ids, str, _progress(console))
    for job in ids[:400]:
        bars.show(running(job, 3))
    lines = screen(bars, console)
    assert len(lines) <= 12 - 1
    assert "400 running, 600 waiting" in lines[0]
    for job in ids[:399]:
        now.at += 0.1
        bars.show(ended(job, at=now.at))
    bars.show(running(ids[399], 4))
    lines = screen(bars, console)
    assert len(lines) == 2
    assert "399 done, 1 running, 600 waiting" in lines[0]
    assert "10.0 jobs/s" in lines[0]
    assert "j399" in lines[1]


def test_a_job_that_goes_back_to_its_queue_loses_its_bar(console: Console) -> None:
    bars = Bars(["a", "b"], str, _progress(console))
    bars.show(running("a", 3))
    assert len(screen(bars, console)) == 2
    bars.show(ended("a", JobState.QUEUED))
    assert len(screen(bars, console)) == 1
