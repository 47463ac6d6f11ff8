import pytest

from overpaint_worker.crashes import Barren, InFlight, Watch


def watch(**more: object) -> Watch:
    made = Watch(started_at=0.0, start_s=100.0, answer_s=10.0, cpu_stage_s=50.0)
    made.ready = True
    for name, value in more.items():
        setattr(made, name, value)
    return made


def jobs(*names: str, at: float = 0.0) -> dict[str, InFlight]:
    return {name: InFlight(sent_at=at) for name in names}


def test_an_engine_that_never_starts_is_hung_after_its_time() -> None:
    w = watch(ready=False)
    assert w.hang(100.0) is None
    assert "no start" in str(w.hang(100.1))


def test_an_idle_engine_without_jobs_never_hangs() -> None:
    assert watch().hang(1e9) is None


def test_a_unit_of_work_hangs_when_its_own_budget_is_over() -> None:
    w = watch(jobs=jobs("a"))
    w.unit("load", 600.0, ["a"], now=5.0)
    assert w.hang(605.0) is None
    assert "load" in str(w.hang(605.1))
    w.unit("denoise", 2.0, ["a"], now=605.0)
    assert "denoise" in str(w.hang(607.1))


def test_an_engine_that_says_nothing_about_a_job_hangs() -> None:
    w = watch(jobs=jobs("a", at=7.0))
    assert w.hang(17.0) is None
    assert "no word" in str(w.hang(17.1))
    w.heard(17.0)
    assert w.hang(27.0) is None


def test_a_picture_that_takes_too_long_on_a_cpu_thread_hangs_though_the_device_is_idle_or_busy() -> None:
    w = watch(jobs=jobs("a"))
    w.progress("a", "prepare", 0, now=1.0)
    assert w.hang(51.0) is None
    assert "prepare of job a" in str(w.hang(51.1))
    w.unit("denoise", 1000.0, ["b"], now=40.0)
    assert "prepare of job a" in str(w.hang(51.1))


def test_a_crash_counts_against_the_unit_of_work_and_the_cpu_threads_only() -> None:
    w = watch(jobs=jobs("in_unit", "on_cpu", "between", "waiting"))
    w.progress("in_unit", "denoise", 1, now=1.0)
    w.progress("between", "encode", 0, now=1.0)
    w.progress("on_cpu", "prepare", 0, now=1.0)
    w.unit("denoise", 10.0, ["in_unit", "left_already"], now=1.0)
    assert w.suspects() == {"in_unit", "on_cpu"}


def test_a_job_that_kills_the_engine_before_a_word_of_it_is_a_suspect() -> None:
    assert watch(jobs=jobs("a", "b")).suspects() == {"a", "b"}


def test_three_crashes_without_a_step_are_the_devices_fault_and_a_step_starts_the_count_anew() -> None:
    barren = Barren()
    for _ in range(2):
        barren.ended(watch(jobs=jobs("a", "b")))
    assert not barren.give_up
    stepped = watch(jobs=jobs("a"))
    stepped.progress("a", "denoise", 1, now=0.0)
    barren.ended(stepped)
    for _ in range(2):
        barren.ended(watch())
    assert not barren.give_up
    barren.ended(watch())
    assert barren.give_up


def test_a_job_that_runs_alone_explains_its_crash_by_itself() -> None:
    barren = Barren()
    for _ in range(5):
        barren.ended(watch(jobs={"poison": InFlight(sent_at=0.0, alone=True)}))
    assert not barren.give_up


def test_entering_the_denoise_stage_is_no_step() -> None:
    w = watch(jobs=jobs("a"))
    w.progress("a", "denoise", 0, now=0.0)
    assert w.steps == 0


@pytest.mark.parametrize(("crashes", "pause"), [(0, 0.0), (1, 0.0), (2, 1.0), (3, 2.0), (4, 4.0), (20, 30.0)])
def test_the_pause_before_a_restart_grows_to_half_a_minute(crashes: int, pause: float) -> None:
    barren = Barren()
    for _ in range(crashes):
        barren.ended(watch())
    assert barren.pause_s == pause


def test_the_end_of_an_attempt_before_leaves_the_one_that_runs_under_watch() -> None:
    w = watch(ready=True, jobs={"a": InFlight(sent_at=0.0, token=2)})
    w.over("a", 1)
    assert w.suspects() == {"a"}
    w.over("a", 2)
    assert w.suspects() == frozenset()
