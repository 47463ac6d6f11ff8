"""The engine's client against a real process that speaks the protocol (the fake engine)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from overpaint_shared.errors import EngineDied, EngineHung
from overpaint_worker import engine_process, protocol
from overpaint_worker import spare as spare_module
from overpaint_worker.crashes import Blame
from overpaint_worker.engine_client import Answer, EngineClient, Gone
from overpaint_worker.engine_process import Launch, engine_environment
from tests import fake_engine
from tests.at_work import kill_at
from tests.waiting import wait_until

PROGRAM = fake_engine.__file__
FAKE = f"import runpy; runpy.run_path({PROGRAM!r}, run_name='__main__')"


@dataclass
class World:
    journal: Path
    ready: list[protocol.Ready] = field(default_factory=list)
    gone: int = 0
    credits: int = 0
    progress: list[protocol.Progress] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    not_loaded: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    client: EngineClient = field(init=False)

    def start(
        self,
        *,
        spare: bool = False,
        models: Sequence[str] = (),
        argv: Sequence[str] = (sys.executable, PROGRAM),
        **environment: str,
    ) -> None:
        launch = Launch(
            argv=argv,
            environment=engine_environment("") | {fake_engine.JOURNAL: str(self.journal)} | environment,
            answer_s=1.0,
        )
        self.client = EngineClient(launch, self, models=models, spare=spare)
        self.client.start()

    def spares(self) -> list[int]:
        """The process ids of all spares that were started."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [event["pid"] for event in map(json.loads, lines) if event["event"] == "spare"]

    def spare(self, number: int = 1) -> int:
        """Wait until the spare of that number is warm; its process id."""
        of = self.client._spare
        assert of is not None
        wait_until(lambda: len(self.spares()) == number and of._warm, what="a warm spare")
        return self.spares()[-1]

    def up(self, times: int = 1) -> int:
        wait_until(lambda: len(self.ready) >= times, what="the engine is ready")
        return self.ready[-1].pid

    def render(
        self, job: str, steps: int = 3, alone: bool = False, model: str = "tiny", **script: Any
    ) -> Future[Answer]:
        spec = {"model": model, "sampling": {"steps": steps}, "prompt": json.dumps(script)}
        return self.client.render(
            protocol.Render(
                job=job, token=1, spec_json=json.dumps(spec), inputs={"a": b"x" * 100}, alone=alone
            )
        )

    def stepped(self, job: str) -> bool:
        return any(p.job == job and p.step > 0 for p in self.progress)

    def engine_ready(self, ready: protocol.Ready) -> None:
        self.ready.append(ready)

    def engine_gone(self) -> None:
        self.gone += 1

    def engine_progress(self, progress: protocol.Progress) -> None:
        self.progress.append(progress)

    def engine_credits(self, slots: int) -> None:
        self.credits = slots

    def engine_loaded(self, model: str, seconds: float) -> None:
        self.loaded.append(model)

    def engine_not_loaded(self, model: str) -> None:
        self.not_loaded.append(model)

    def engine_given_up(self, reason: str) -> None:
        self.given_up.append(reason)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "journal")
    yield made
    made.client.stop()


LONG = 100_000


def test_jobs_share_the_engine_and_each_gets_its_own_files(world: World) -> None:
    world.start()
    world.up()
    futures = {job: world.render(job, steps=20) for job in ("a", "b", "c")}
    for job, future in futures.items():
        done = future.result(30)
        assert isinstance(done, protocol.Done)
        assert done.files["image.png"] == b"picture of " + job.encode()
    assert max(p.company for p in world.progress) > 1
    wait_until(lambda: world.credits == 6)


def test_a_killed_engine_fails_all_its_jobs_at_once_and_is_up_again(world: World) -> None:
    world.start()
    pid = world.up()
    futures = [world.render(job, steps=LONG) for job in ("a", "b")]
    wait_until(lambda: world.stepped("a") and world.stepped("b"))
    kill_at(pid, ["a", "b"])
    killed = time.monotonic()
    answers = [future.result(5) for future in futures]
    assert time.monotonic() - killed < 1.0
    assert all(isinstance(a, Gone) and isinstance(a.error, EngineDied) for a in answers)
    assert {a.blame for a in answers if isinstance(a, Gone)} == {Blame.SUSPECT}, "either may have done it"
    assert "SIGKILL" in str(answers[0])
    assert world.up(times=2) != pid
    assert isinstance(world.render("c").result(30), protocol.Done)
    assert world.gone == 1


def test_only_jobs_at_work_are_counted_when_the_engine_dies(world: World) -> None:
    world.start()
    world.up()
    first = world.render("alone", steps=LONG, alone=True)
    wait_until(lambda: world.stepped("alone"))
    waits = world.render("waits", steps=3)
    wait_until(lambda: world.client._process and "waits" in world.client._process.watch.jobs)
    assert not world.stepped("waits")
    kill_at(world.ready[-1].pid, ["alone"])
    for future, blame in ((first, Blame.GUILTY), (waits, Blame.BESIDE)):
        answer = future.result(5)
        assert isinstance(answer, Gone)
        assert answer.blame is blame


def test_a_job_that_kills_before_a_word_of_it_is_counted_and_the_one_of_the_last_word_is_not(
    world: World,
) -> None:
    world.start()
    world.up()
    before = world.render("before", steps=LONG)
    wait_until(lambda: world.stepped("before"))
    culprit = world.render("culprit", do="kill", at=0)
    for future, blame in ((before, Blame.BESIDE), (culprit, Blame.GUILTY)):
        answer = future.result(10)
        assert isinstance(answer, Gone)
        assert answer.blame is blame


def test_nobody_is_counted_for_an_engine_that_ends_between_two_units(world: World) -> None:
    world.start()
    world.up()
    answer = world.render("a", do="between").result(10)
    assert isinstance(answer, Gone)
    assert answer.blame is Blame.BESIDE
    assert world.stepped("a"), "it was at work before"


def test_a_stopped_engine_is_killed_at_the_deadline_of_its_unit_of_work(world: World) -> None:
    world.start(**{fake_engine.BUDGET_S: "0.5"})
    pid = world.up()
    future = world.render("a", steps=LONG)
    wait_until(lambda: world.stepped("a"))
    os.kill(pid, signal.SIGSTOP)
    answer = future.result(10)
    assert isinstance(answer, Gone)
    assert isinstance(answer.error, EngineHung)
    assert "denoise" in answer.error.message
    assert world.up(times=2) != pid


def test_an_idle_engine_that_stopped_is_found_when_it_gets_a_job(world: World) -> None:
    world.start()
    pid = world.up()
    os.kill(pid, signal.SIGSTOP)
    answer = world.render("a").result(10)
    assert isinstance(answer, Gone)
    assert isinstance(answer.error, EngineHung)
    assert world.up(times=2) != pid


def test_a_full_pipe_to_a_stopped_engine_holds_nobody_up(world: World) -> None:
    world.start()
    pid = world.up()
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    big = protocol.Render(job="big", token=1, spec_json="{}", inputs={"a": bytes(8_000_000)})
    future = world.client.render(big)
    world.client.cancel("big", 1)
    assert time.monotonic() - began < 0.5, "neither call waited for the engine to read"
    assert isinstance(future.result(10), Gone)


def test_a_cancelled_job_stops_and_the_model_stays_warm(world: World) -> None:
    world.start()
    pid = world.up()
    future = world.render("a", steps=LONG)
    wait_until(lambda: world.stepped("a"))
    world.client.cancel("a", 1)
    assert future.result(5) == protocol.Cancelled(job="a", token=1)
    assert isinstance(world.render("b").result(30), protocol.Done)
    events = [json.loads(line) for line in world.journal.read_text().splitlines()]
    assert [e["event"] for e in events].count("loaded") == 1
    assert world.client.pid == pid


def test_a_forgotten_job_is_answered_at_once(world: World) -> None:
    world.start()
    pid = world.up()
    future = world.render("a", steps=LONG)
    wait_until(lambda: world.stepped("a"))
    os.kill(pid, signal.SIGSTOP)
    world.client.forget("a", 1)
    assert future.done()
    os.kill(pid, signal.SIGCONT)


def test_three_starts_without_a_step_are_given_up(world: World) -> None:
    world.start(**{fake_engine.DIE_AT_START: "1"})
    wait_until(lambda: world.given_up, within_s=60)
    assert "3 times" in world.given_up[0]
    assert world.ready == []


def test_a_model_whose_load_ends_engines_is_not_taken_for_a_broken_device(world: World) -> None:
    world.start(models=["torn", "tiny"], **{fake_engine.DEADLY: "torn"})
    for times in (1, 2):
        world.up(times)
        assert isinstance(world.render(f"torn {times}", model="torn").result(30), Gone)
    world.up(times=3)
    assert isinstance(world.render("a").result(30), protocol.Done)
    assert world.given_up == []


def test_a_model_whose_early_load_ends_engines_is_loaded_early_no_more(world: World) -> None:
    def load_early(ready: protocol.Ready) -> None:
        world.ready.append(ready)
        world.client.load("torn")

    world.engine_ready = load_early  # type: ignore[method-assign]
    world.start(models=["torn", "tiny"], **{fake_engine.DEADLY: "torn"})
    wait_until(lambda: world.not_loaded or world.given_up, within_s=30)
    assert (world.not_loaded, world.given_up, world.gone) == (["torn"], [], 2)
    assert isinstance(world.render("a").result(30), protocol.Done)


def test_an_engine_that_cannot_be_started_is_given_up(world: World) -> None:
    world.client = EngineClient(Launch(argv=["/no/such/program"], environment={}), world)
    world.client.start()
    wait_until(lambda: world.given_up)
    assert "No such file" in world.given_up[0]


def test_an_engine_for_which_there_is_no_thread_is_ended_and_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[bytes]] = []

    def no_thread(pipe: IO[bytes]) -> None:
        raise RuntimeError("can't start new thread")

    def popen(*args: Any, **more: Any) -> subprocess.Popen[bytes]:
        begun.append(real(*args, **more))
        return begun[-1]

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(engine_process, "EngineOutput", no_thread)
    world.start()
    wait_until(lambda: world.given_up)
    assert "new thread" in world.given_up[0]
    assert [each.returncode for each in begun] == [-signal.SIGKILL]


def test_a_keeper_that_fails_is_told_and_its_jobs_are_answered(world: World) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    world.engine_gone = broken  # type: ignore[method-assign]
    world.start()
    pid = world.up()
    future = world.render("a", steps=LONG)
    os.kill(pid, signal.SIGKILL)
    assert isinstance(future.result(10), Gone)
    wait_until(lambda: world.given_up)
    assert "a bug" in world.given_up[0]


def test_a_watchdog_that_cannot_tend_the_spare_still_finds_a_hang(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: spare_module.Spare, *, wanted: bool) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(spare_module.Spare, "tend", broken)
    world.start(spare=True)
    os.kill(world.up(), signal.SIGSTOP)
    answer = world.render("a").result(10)
    assert isinstance(answer, Gone)
    assert isinstance(answer.error, EngineHung)


def test_a_defect_of_the_worker_ends_the_engine_and_not_the_answers(world: World) -> None:
    def broken(progress: protocol.Progress) -> None:
        raise RuntimeError("a bug")

    world.engine_progress = broken  # type: ignore[method-assign]
    world.start()
    world.up()
    assert isinstance(world.render("a").result(30), Gone)
    world.up(2)


def test_a_job_for_an_engine_that_is_not_up_comes_back_uncounted(world: World) -> None:
    world.start(**{fake_engine.START_S: "30"})
    answer = world.render("a").result(1)
    assert isinstance(answer, Gone)
    assert answer.blame is Blame.BESIDE


def test_stopping_ends_the_process_and_answers_what_it_had(world: World) -> None:
    world.start()
    world.up()
    process = world.client._process
    assert process
    future = world.render("a", steps=LONG)
    wait_until(lambda: world.stepped("a"))
    world.client.stop()
    answer = future.result(1)
    assert isinstance(answer, Gone)
    assert answer.blame is Blame.BESIDE
    assert isinstance(world.render("b").result(1), Gone), "what comes too late is answered, too"
    wait_until(lambda: process.popen.poll() is not None)
    assert world.gone == 0


def test_the_engine_is_not_ended_by_signals_to_the_group(world: World) -> None:
    world.start()
    pid = world.up()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert isinstance(world.render("a").result(30), protocol.Done)
    assert world.client.pid == pid


def test_failures_of_a_job_leave_the_engine_alone(world: World) -> None:
    world.start()
    pid = world.up()
    for do, kind in (("fail", "job"), ("unable", "unable"), ("oom", "device")):
        answer = world.render(do, do=do).result(30)
        assert isinstance(answer, protocol.Failed)
        assert answer.kind == kind
    assert world.client.pid == pid


def test_a_model_is_loaded_before_any_job_and_one_that_cannot_be_is_told(world: World) -> None:
    world.start(**{fake_engine.UNLOADABLE: "torn"})
    world.up()
    world.client.load("torn")
    world.client.load("tiny")
    wait_until(lambda: world.loaded and world.not_loaded)
    assert (world.loaded, world.not_loaded) == (["tiny"], ["torn"])
    assert world.client.loaded == ("tiny",)


# The spare


def test_the_spare_takes_the_place_of_an_engine_that_dies_and_another_gets_warm(world: World) -> None:
    world.start(spare=True)
    pid = world.up()
    first = world.spare()
    future = world.render("a", steps=LONG)
    wait_until(lambda: world.stepped("a"))
    os.kill(pid, signal.SIGKILL)
    assert isinstance(future.result(5), Gone)
    assert world.up(times=2) == first
    assert isinstance(world.render("b").result(30), protocol.Done)
    assert world.spare(number=2) not in {first, pid}


def test_the_spare_has_the_engines_rules_for_secrets_and_signals(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_PASSWORD", "hush")
    world.start(spare=True)
    world.up()
    pid = world.spare()
    assert b"hush" not in Path(f"/proc/{pid}/environ").read_bytes()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    os.kill(world.ready[-1].pid, signal.SIGKILL)
    assert world.up(times=2) == pid


def test_a_spare_that_is_stopped_takes_nobodys_place(world: World) -> None:
    world.start(spare=True)
    pid = world.up()
    stopped = world.spare()
    os.kill(stopped, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    assert world.up(times=2) not in {pid, stopped}
    assert not Path(f"/proc/{stopped}").exists()


def test_a_stopped_spare_is_replaced_before_it_is_needed(world: World) -> None:
    world.start(spare=True)
    world.up()
    stopped = world.spare()
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: not Path(f"/proc/{stopped}").exists(), what="the stopped spare is ended")


def test_a_warm_spare_has_less_time_to_start_than_a_new_engine(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_module, "WARM_START_S", 0.2)
    world.start(spare=True, **{fake_engine.START_S: "1.5"})
    pid = world.up()
    slow = world.spare()
    os.kill(pid, signal.SIGKILL)
    assert world.up(times=2) not in {pid, slow}
    assert world.client._barren.count == 1


def test_a_spare_that_dies_is_counted_against_nobody(world: World) -> None:
    world.start(spare=True)
    pid = world.up()
    for number in (1, 2, 3):
        os.kill(world.spare(number), signal.SIGKILL)
        spare = world.client._spare
        assert spare is not None
        wait_until(lambda of=spare: of._process is None, what="its end is noticed")
        spare._not_before = 0.0  # else the next one waits some seconds
    assert isinstance(world.render("a").result(30), protocol.Done)
    assert (world.client.pid, world.gone, world.given_up) == (pid, 0, [])
    assert (world.client._barren.count, world.client._barren.in_a_row) == (0, 0)


def test_an_engine_whose_spare_is_not_warm_is_started_anew(world: World) -> None:
    world.start(spare=True, **{fake_engine.SPARE_DIES: "1"})
    pid = world.up()
    wait_until(world.spares)
    os.kill(pid, signal.SIGKILL)
    assert world.up(times=2) not in {pid, *world.spares()}


def test_the_spare_ends_with_its_client(world: World) -> None:
    world.start(spare=True)
    world.up()
    pid = world.spare()
    world.client.stop()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_no_spare_is_started_while_memory_is_short_and_a_warm_one_gives_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [spare_module.STARTS_ABOVE - 1]
    monkeypatch.setattr(spare_module, "free_memory", lambda: free[0])
    monkeypatch.setattr(spare_module, "LOOK_S", 0.0)
    world.start(spare=True)
    world.up()
    assert isinstance(world.render("a", steps=50).result(30), protocol.Done)
    assert world.spares() == []
    free[0] = spare_module.STARTS_ABOVE
    pid = world.spare()
    free[0] = spare_module.ENDS_BELOW - 1
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_program_that_knows_no_spare_is_asked_once(world: World) -> None:
    program = (
        f"import sys; sys.argv.remove('--spare') if '--spare' in sys.argv else 0; sys.path[0] = ''\n{FAKE}"
    )
    world.start(spare=True, argv=[sys.executable, "-c", program])
    world.up()
    spare = world.client._spare
    assert spare is not None
    wait_until(lambda: spare._closed)
    assert isinstance(world.render("a").result(30), protocol.Done)
