import pytest

from overpaint_worker.crashes import TEST_JOB, Barren, Blame, InFlight, Watch
from overpaint_worker.evidence import AtWork
from overpaint_worker.protocol import Loading, Progress


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


def at(*names: str, token: int = 0) -> AtWork:
    return AtWork(attempts=frozenset((name, token) for name in names))


RESTS = AtWork(rests=True)


def test_the_one_job_at_work_is_guilty_and_those_beside_it_are_not() -> None:
    w = watch(jobs=jobs("in_unit", "between", "waiting"), at_work=at("in_unit", "left_already"))
    w.progress("between", "encode", 0, now=1.0)
    assert w.suspects() == {"in_unit"}
    assert w.blame() == {"in_unit": Blame.GUILTY, "between": Blame.BESIDE, "waiting": Blame.BESIDE}


def test_the_evidence_counts_and_not_the_message_that_came_last() -> None:
    w = watch(jobs=jobs("before", "culprit"), at_work=at("culprit"))
    w.unit("denoise", 10.0, ["before"], now=1.0)
    assert w.blame() == {"before": Blame.BESIDE, "culprit": Blame.GUILTY}


def test_nobody_is_counted_for_an_engine_that_ends_between_two_units() -> None:
    w = watch(jobs=jobs("a"), at_work=AtWork())
    w.unit("denoise", 10.0, ["a"], now=1.0)
    assert w.blame() == {"a": Blame.BESIDE}


def test_of_several_at_work_each_is_a_suspect_and_none_is_guilty() -> None:
    w = watch(jobs=jobs("in_unit", "on_cpu", "between"), at_work=at("in_unit", "on_cpu"))
    assert w.blame() == {"in_unit": Blame.SUSPECT, "on_cpu": Blame.SUSPECT, "between": Blame.BESIDE}


def test_evidence_of_an_attempt_before_says_nothing_about_the_one_that_runs() -> None:
    w = watch(jobs={"a": InFlight(sent_at=0.0, token=2)}, at_work=at("a", token=1))
    assert w.blame() == {"a": Blame.BESIDE}


def test_a_job_that_ends_the_engine_while_it_is_taken_off_the_pipe_is_guilty() -> None:
    held = {"a": InFlight(sent_at=0.0, frame=1), "b": InFlight(sent_at=0.0, frame=3)}
    assert watch(jobs=held, at_work=AtWork(frames=frozenset({3}))).blame() == {
        "a": Blame.BESIDE,
        "b": Blame.GUILTY,
    }


def test_a_job_that_hangs_on_a_cpu_thread_is_guilty_and_those_that_step_meanwhile_are_not() -> None:
    w = watch(jobs=jobs("culprit", "steps", "prepares"))
    w.progress("culprit", "prepare", 0, now=1.0)
    w.progress("prepares", "prepare", 0, now=50.0)
    w.unit("denoise", 1000.0, ["steps"], now=50.0)
    w.at_work = at("culprit", "steps", "prepares")
    assert w.blame(w.hang(51.1)) == {
        "culprit": Blame.GUILTY,
        "steps": Blame.BESIDE,
        "prepares": Blame.BESIDE,
    }


def test_a_unit_that_hangs_is_its_own_jobs_fault() -> None:
    w = watch(jobs=jobs("in_unit", "on_cpu"), at_work=at("in_unit", "on_cpu"))
    w.unit("encode", 5.0, ["in_unit"], now=1.0)
    assert w.blame(w.hang(6.1)) == {"in_unit": Blame.GUILTY, "on_cpu": Blame.BESIDE}


def test_a_load_without_a_job_that_ends_the_engine_is_no_jobs_fault() -> None:
    w = watch(jobs=jobs("waiting"), at_work=AtWork())
    w.unit("load", 5.0, [], now=1.0)
    assert w.blame() == {"waiting": Blame.BESIDE}
    assert w.blame(w.hang(6.1)) == {"waiting": Blame.BESIDE}


def test_a_job_whose_picture_is_read_waits_for_the_device_and_is_not_at_work() -> None:
    w = watch(jobs=jobs("loads", "waits"))
    w.note(Progress(job="waits", token=0, stage="prepare", step=0, of=1), now=1.0)
    w.note(Progress(job="waits", token=0, stage="prepare", step=1, of=1), now=2.0)
    w.unit("load", 1800.0, ["loads"], now=2.0)
    assert w.hang(1000.0) is None


def test_a_unit_that_was_over_when_the_engine_was_killed_for_it_is_nobodys_fault() -> None:
    w = watch(jobs=jobs("late", "next"), at_work=at("next"))
    w.unit("encode", 5.0, ["late"], now=1.0)
    assert w.blame(w.hang(6.1)) == {"late": Blame.BESIDE, "next": Blame.BESIDE}


def test_jobs_of_an_engine_whose_evidence_is_damaged_are_suspects_together_and_guilty_alone() -> None:
    assert watch(jobs=jobs("a", "b")).blame() == {"a": Blame.SUSPECT, "b": Blame.SUSPECT}
    assert watch(jobs=jobs("a")).blame() == {"a": Blame.GUILTY}


def poisoned(job: str = "poison", model: str = "tiny") -> Watch:
    return watch(jobs={job: InFlight(sent_at=0.0, spec_json=f'{{"model": "{model}"}}')})


def test_three_starts_that_fail_are_the_devices_fault_and_a_step_starts_the_count_anew() -> None:
    barren = Barren()
    for _ in range(2):
        barren.ended(watch(ready=False))
    stepped = watch(jobs=jobs("a"))
    stepped.progress("a", "denoise", 1, now=0.0)
    barren.ended(stepped)
    for _ in range(2):
        barren.ended(watch(ready=False))
    assert not barren.give_up
    barren.ended(watch(ready=False))
    assert barren.give_up


def test_jobs_alone_never_make_the_device_be_at_fault_but_they_make_it_be_tested() -> None:
    barren = Barren()
    for number in range(32):
        assert not barren.in_doubt
        barren.ended(poisoned(f"poison {number}"))
        barren.ended(poisoned(f"poison {number}", "other"))
        assert barren.in_doubt
        barren.proven()
    assert not barren.give_up
    assert barren.pause_s == 0.0


def test_a_device_that_ends_its_test_three_times_is_at_fault() -> None:
    barren = Barren()
    barren.ended(poisoned())
    barren.ended(poisoned())
    for ended in range(3):
        assert (barren.in_doubt, barren.give_up) == (True, False), ended
        barren.ended(poisoned(TEST_JOB))
    assert barren.give_up


def test_an_engine_that_is_killed_while_it_rests_says_nothing_about_the_device() -> None:
    barren = Barren()
    for _ in range(10):
        barren.ended(watch(at_work=RESTS))
    assert not barren.give_up


def test_a_load_without_a_job_that_ends_the_engine_each_time_is_the_devices_fault() -> None:
    barren = Barren()
    for _ in range(3):
        loads = watch(at_work=AtWork())
        loads.unit("load", 5.0, [], now=1.0)
        barren.ended(loads)
    assert barren.give_up


def rendered(model: str) -> Watch:
    w = poisoned("good", model)
    w.progress("good", "denoise", 1, now=0.0)
    return w


def test_the_device_is_tested_with_what_rendered_last_then_with_what_no_job_had_at_the_end() -> None:
    barren = Barren(models=("torn", "idle", "used"))
    barren.ended(rendered("used"))
    for _ in range(2):
        barren.ended(poisoned(model="torn"))
    assert [barren.next_test() for _ in range(4)] == ["used", "idle", "torn", "used"]


def test_the_device_is_tested_with_the_model_of_the_jobs_where_there_is_no_other() -> None:
    barren = Barren()
    barren.ended(poisoned(model="torn"))
    assert (barren.untried, barren.next_test(), barren.untried) == (True, "torn", False)


def test_an_early_load_that_ends_the_engine_is_the_models_fault_until_a_test_says_else() -> None:
    barren = Barren(models=("torn", "tiny"))
    for _ in range(2):
        loads = watch(at_work=AtWork())
        loads.unit("load", 5.0, [], now=1.0)
        loads.note(Loading(model="torn"), now=1.0)
        barren.ended(loads)
    assert (barren.count, barren.in_doubt, barren.next_test()) == (0, True, "tiny")
    assert (barren.may_load("torn"), barren.may_load("tiny")) == (False, True)


@pytest.mark.parametrize("spec", ["", "[", "[]", "{}", '{"model": 7}', "[" * 100_000])
def test_a_job_whose_spec_is_none_makes_no_trouble(spec: str) -> None:
    barren = Barren()
    barren.ended(watch(jobs={"a": InFlight(sent_at=0.0, spec_json=spec)}))
    assert barren.next_test() is None


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
