"""One attempt's way, with services in memory: what each kind of failure comes to."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest

from overpaint_shared.errors import (
    EngineDied,
    InputError,
    LedgerUnreachable,
    OverpaintError,
    StoreDenied,
    StoreError,
    StoreMissing,
    StoreUnreachable,
)
from overpaint_shared.ledger import (
    Cancelled,
    Claim,
    Done,
    Failed,
    Finished,
    JobState,
    Outcome,
    Released,
    ReleaseReason,
    Wakeup,
)
from overpaint_shared.settings import Limits
from overpaint_worker import protocol, storage
from overpaint_worker.crashes import Blame
from overpaint_worker.engine_client import Answer, Gone
from overpaint_worker.keeper import Keeper
from overpaint_worker.metrics import Metrics
from overpaint_worker.patience import Patience
from overpaint_worker.storage import THREADS, WAITING, Storage
from overpaint_worker.tasks import Renderer, Room
from tests.waiting import wait_until

SHA = "0" * 64
SPEC = {
    "version": 1,
    "model": "tiny",
    "source": {"image": f"sha256:{SHA}"},
    "method": {"kind": "img2img"},
    "prompt": "",
    "sampling": {"seed": 0, "steps": 2},
}


@dataclass
class World:
    """A room whose every part can be told to fail."""

    spec: dict[str, Any] = field(default_factory=lambda: SPEC)
    answer: Answer = field(
        default_factory=lambda: protocol.Done(
            job="j", token=7, files={"image.png": b"p", "receipt.json": b"{}"}
        )
    )
    verdict: Any = "ok"
    crashes: int = 0
    suspect: bool = False
    accepts: bool = True
    ends_as: JobState = JobState.DONE
    fetch_errors: list[OverpaintError] = field(default_factory=list)
    answers: bool = False
    """Whether S3 answers what is not about an object."""
    put_errors: list[OverpaintError] = field(default_factory=list)
    finish_errors: list[OverpaintError] = field(default_factory=list)
    on_put: Callable[[], object] = lambda: None
    on_render: Callable[["World"], None] = lambda _: None
    patience: Patience = field(default_factory=lambda: Patience(fetch_s=5, store_s=5, commit_s=5))

    worker_id: str = "w"
    name: str = "w@host"
    limits: Limits = field(default_factory=Limits)
    endpoint: str = "memory"
    rendered: list[protocol.Render] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    deleted: list[tuple[str, int]] = field(default_factory=list)
    finished: list[Outcome] = field(default_factory=list)
    released: list[ReleaseReason] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    holder: str | None = None
    name_errors: list[OverpaintError] = field(default_factory=list)
    keeper: Keeper = field(init=False)
    storage: Storage = field(init=False)

    def __post_init__(self) -> None:
        self.keeper = Keeper(
            cast("Any", self),
            "w",
            renew_s=1,
            publish=self.publish,
            on_cancel=lambda _: None,
            on_fenced=lambda _: None,
            metrics=self.metrics,
        )
        self.storage = Storage(cast("Any", self), self.keeper, lambda: None)

    @property
    def ledger(self) -> "World":
        return self

    store = engine = ledger

    # The ledger

    def claim(self, job_id: str) -> Claim:
        return Claim(
            self.verdict, 7, 1, json.dumps(self.spec), "owner", self.crashes, (wakeup("claim"),),
            suspect=self.suspect,
        )  # fmt: skip

    def finish(self, job: str, token: int, outcome: Outcome) -> Finished:
        if self.finish_errors:
            raise self.finish_errors.pop(0)
        self.finished.append(outcome)
        if isinstance(outcome, Done) and outcome.name is not None and self.holder in {None, job}:
            self.holder = self.holder or job
            return Finished(self.accepts, JobState.RUNNING, (), naming=self.accepts)
        return Finished(self.accepts, self.ends_as, (wakeup("finish"),))

    def named(self, owner: str, name: str) -> str | None:
        return self.holder

    def release(
        self, job: str, token: int, reason: ReleaseReason, detail: str = "", said: str = ""
    ) -> Released:
        self.released.append(reason)
        return Released(JobState.QUEUED, (wakeup("release"),))

    def publish(self, wakeups: Sequence[Wakeup]) -> None:
        self.published += [w.job_id for w in wakeups]

    # The store

    def get_input(self, owner: str, sha256: str, max_bytes: int) -> bytes:
        assert (owner, sha256, max_bytes) == ("owner", SHA, self.limits.max_input_bytes)
        if self.fetch_errors:
            raise self.fetch_errors.pop(0)
        return b"picture"

    read_external = get_input

    def ping(self) -> None:
        if not self.answers:
            raise away()

    def put_result(self, job: str, token: int, name: str, data: bytes, content_type: str) -> str:
        self.on_put()
        if self.put_errors:
            raise self.put_errors.pop(0)
        self.stored[name] = data
        return f"results/{job}/{token}/{name}"

    def put_named(
        self, owner: str, name: str, data: bytes, content_type: str, *, allowed: Callable[[], bool]
    ) -> bool:
        if self.name_errors:
            raise self.name_errors.pop(0)
        if allowed():
            self.stored[f"{owner}:{name}:{content_type}"] = data
        return allowed()

    def delete_attempt(self, job: str, token: int) -> int:
        self.deleted.append((job, token))
        return 1

    # The engine

    def render(self, job: protocol.Render) -> Future[Answer]:
        self.rendered.append(job)
        self.on_render(self)
        future: Future[Answer] = Future()
        future.set_result(self.answer)
        return future

    def cancel(self, job: str, token: int) -> None:
        pass

    def last_words(self) -> str:
        return ""

    def run(self) -> Outcome | None:
        return Renderer(cast("Room", self)).run("j")


def wakeup(of: str) -> Wakeup:
    return Wakeup(of, "tiny", 3, "")


def away() -> StoreUnreachable:
    return StoreUnreachable("S3 does not answer")


def test_a_job_is_fetched_rendered_stored_and_committed_and_others_are_woken() -> None:
    world = World()
    assert isinstance(world.run(), Done)
    assert world.rendered[0].inputs == {f"sha256:{SHA}": b"picture"}
    assert world.stored == {"image.png": b"p", "receipt.json": b"{}"}
    (done,) = world.finished
    assert isinstance(done, Done)
    assert done.result["files"] == {n: f"results/j/7/{n}" for n in ("image.png", "receipt.json")}
    assert world.published == ["claim", "finish"]
    assert world.deleted == []


def test_a_picture_is_stored_under_the_jobs_own_name_for_it_before_the_job_is_done() -> None:
    named = {**SPEC, "output": {"format": "webp", "key": "shots/12.webp"}}
    answer = protocol.Done(job="j", token=7, files={"image.webp": b"p", "receipt.json": b"{}"})
    world = World(spec=named, answer=answer, finish_errors=[away()])
    assert isinstance(done := world.run(), Done)
    assert world.stored["owner:shots/12.webp:image/webp"] == b"p"
    assert done.result["key"] == "named/owner/shots/12.webp"
    assert [each.name for each in world.finished if isinstance(each, Done)] == ["shots/12.webp", None]
    assert world.deleted == []


def named_world(**more: Any) -> World:
    return World(spec={**SPEC, "output": {"key": "a.png"}}, **more)


def test_a_name_that_a_later_job_has_is_left_to_it() -> None:
    world = named_world(holder="later")
    assert isinstance(world.run(), Done)
    assert world.stored.keys() == {"image.png", "receipt.json"}


def test_an_attempt_that_cannot_name_its_committed_picture_deletes_nothing() -> None:
    world = named_world(name_errors=[away()] * 9, patience=Patience(fetch_s=5, store_s=0, commit_s=5))
    assert world.run() is None
    assert len(world.finished) == 1, "committed, and left to a reaper"
    assert (world.deleted, world.released) == ([], [])


def test_a_name_that_s3_cannot_write_holds_up_no_other_job_and_is_left_to_a_reaper() -> None:
    world = named_world(name_errors=[away()] * 100, answers=True, patience=Patience(fetch_s=0.5, store_s=5))
    changes: list[bool] = []
    world.storage = Storage(
        cast("Any", world), world.keeper, lambda: None, lambda: changes.append(world.storage.blocked)
    )
    assert world.run() is None
    assert not any(changes)
    assert len(world.finished) == 1, "committed"
    assert (world.deleted, world.released) == ([], [])


def test_a_name_that_s3_refuses_for_good_fails_the_job() -> None:
    failed = named_world(name_errors=[StoreError("there is a folder")]).run()
    assert isinstance(failed, Failed)
    assert failed.error["code"] == "store"


def test_a_stored_picture_that_is_damaged_fails_the_job_at_once() -> None:
    world = World(fetch_errors=[StoreError("damaged")] * 100)
    assert isinstance(world.run(), Failed)
    assert len(world.fetch_errors) == 99


def test_a_cancel_ends_an_attempt_whose_store_hangs() -> None:
    release = threading.Event()
    world = World()
    world.on_put = lambda: world.keeper.running[0].__setattr__("cancelled", True) or release.wait(30)
    began = time.monotonic()
    assert isinstance(world.run(), Cancelled)
    assert time.monotonic() - began < 5
    release.set()


def test_while_a_result_waits_for_s3_no_job_is_taken_and_the_record_says_so() -> None:
    seen: list[tuple[bool, str]] = []
    world = World(put_errors=[away(), away()])
    world.on_put = lambda: seen.append((world.storage.blocked, world.keeper.running[0].stage))
    assert isinstance(world.run(), Done)
    assert seen[-1] == (True, WAITING)
    assert not world.storage.blocked


def test_of_several_writes_only_those_that_failed_are_made_again() -> None:
    world = World(put_errors=[away()])
    puts: list[int] = []
    world.on_put = lambda: puts.append(1)
    assert isinstance(world.run(), Done)
    assert len(puts) == 3


@pytest.mark.parametrize(
    ("crashes", "suspect", "alone"), [(0, False, False), (1, False, True), (0, True, True)]
)
def test_a_job_that_was_in_a_crash_runs_alone(crashes: int, suspect: bool, alone: bool) -> None:
    world = World(crashes=crashes, suspect=suspect)
    world.run()
    assert world.rendered[0].alone is alone


def test_a_device_that_fails_under_a_job_alone_counts_against_it() -> None:
    world = World(answer=engine_failed("engine", "device"), suspect=True)
    assert world.run() is None
    assert world.released == [ReleaseReason.CRASHED]


@pytest.mark.parametrize("verdict", ["busy", "skip", "gone", "dead"])
def test_a_message_that_is_no_work_does_nothing(verdict: str) -> None:
    world = World(verdict=verdict)
    assert world.run() is None
    assert (world.rendered, world.finished, world.released) == ([], [], [])


def test_services_that_come_back_in_time_cost_nothing_but_time() -> None:
    world = World(
        fetch_errors=[away()], put_errors=[away()], finish_errors=[LedgerUnreachable("Redis does not answer")]
    )
    assert isinstance(world.run(), Done)
    assert len(world.finished) == 1


def test_a_store_that_stays_away_gives_the_job_back_uncounted() -> None:
    world = World(fetch_errors=[away()] * 100, patience=Patience(fetch_s=0.3, store_s=0.3, commit_s=1))
    assert world.run() is None
    assert world.released == [ReleaseReason.STOPPED]
    assert world.published == ["claim", "release"]


def test_one_picture_that_s3_cannot_give_holds_up_no_other_job_and_counts() -> None:
    world = World(fetch_errors=[away()] * 100, answers=True, patience=Patience(fetch_s=0.5, store_s=5))
    closed: list[bool] = []
    world.storage = Storage(
        cast("Any", world),
        world.keeper,
        lambda: closed.append(world.storage.blocked),
        lambda: closed.append(True),
    )
    assert world.run() is None
    assert world.released == [ReleaseReason.FAULT]
    assert closed
    assert not any(closed)


def test_one_picture_that_s3_never_sends_holds_up_no_other_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SILENT_S", 0.3)
    release = threading.Event()
    world = World(answers=True, patience=Patience(fetch_s=1.5))
    world.get_input = lambda *_: release.wait(30) and b""  # type: ignore[method-assign]
    closed: list[bool] = []
    world.storage = Storage(cast("Any", world), world.keeper, lambda: None, lambda: closed.append(True))
    assert world.run() is None
    assert world.released == [ReleaseReason.FAULT]
    assert not closed
    release.set()


def test_a_read_that_fails_opens_the_worker_again_once_s3_answers() -> None:
    world = World(fetch_errors=[away()] * 100, patience=Patience(fetch_s=4.0))
    changes: list[bool] = []

    def changed() -> None:
        changes.append(world.storage.blocked)
        world.answers = True

    world.storage = Storage(cast("Any", world), world.keeper, lambda: None, changed)
    world.run()
    assert changes == [True, False]


def test_a_picture_of_another_bucket_that_refuses_fails_the_job_at_once() -> None:
    elsewhere = {**SPEC, "source": {"image": "s3://other/a.png"}}
    world = World(spec=elsewhere, fetch_errors=[StoreDenied("no permission")] * 100, answers=True)
    world.read_external = lambda *_: world.get_input("owner", SHA, Limits().max_input_bytes)  # type: ignore[method-assign]
    failed = world.run()
    assert isinstance(failed, Failed)
    assert (failed.error["code"], failed.error["field"]) == ("input", "source.image")
    assert len(world.fetch_errors) == 99


def test_a_key_that_s3_does_not_know_is_not_the_fault_of_a_picture_in_another_bucket() -> None:
    elsewhere = {**SPEC, "source": {"image": "s3://other/a.png"}}
    world = World(
        spec=elsewhere, fetch_errors=[StoreDenied("no such key")] * 100, patience=Patience(fetch_s=0.2)
    )
    world.read_external = lambda *_: world.get_input("owner", SHA, Limits().max_input_bytes)  # type: ignore[method-assign]
    assert world.run() is None
    assert world.released == [ReleaseReason.STOPPED]


def test_what_waits_for_a_thread_is_not_asked_for_twice_and_takes_none_from_the_attempts() -> None:
    world, release = World(), threading.Event()
    made: list[int] = []

    def slow(number: int) -> None:
        made.append(number)
        release.wait(30)

    for number in (*range(THREADS), *range(THREADS)):
        world.storage.later(number, partial(slow, number))
    assert isinstance(world.run(), Done)
    assert len(made) < THREADS
    release.set()
    wait_until(lambda: len(made) == THREADS)
    assert sorted(made) == list(range(THREADS))
    wait_until(lambda: world.storage.later(0, partial(slow, 0)) or len(made) > THREADS)


def test_a_store_that_takes_no_results_gives_the_job_back_and_leaves_no_rest() -> None:
    world = World(put_errors=[away()] * 100, patience=Patience(fetch_s=1, store_s=0.3, commit_s=1))
    assert world.run() is None
    assert world.released == [ReleaseReason.STOPPED]
    wait_until(lambda: world.deleted == [("j", 7)])


def test_the_farms_own_store_that_refuses_is_not_the_jobs_fault() -> None:
    world = World(fetch_errors=[StoreDenied("no permission")] * 100, patience=Patience(fetch_s=0.2))
    assert world.run() is None
    assert world.released == [ReleaseReason.STOPPED]


@pytest.mark.parametrize(
    "error", [StoreMissing("inputs/x"), InputError("too large", fix="use a smaller one")]
)
def test_a_picture_that_is_missing_or_too_large_fails_the_job_by_its_field(error: OverpaintError) -> None:
    failed = World(fetch_errors=[error]).run()
    assert isinstance(failed, Failed)
    assert failed.error["code"] == "input"
    assert failed.error["field"] == "source.image"
    assert failed.error["fix"]


def test_a_path_on_the_producers_machine_is_refused() -> None:
    failed = World(spec=SPEC | {"source": {"image": "photo.png"}}).run()
    assert isinstance(failed, Failed)
    assert failed.error["field"] == "source.image"


def engine_failed(code: str, kind: str) -> protocol.Failed:
    return protocol.Failed(job="j", token=7, error={"code": code, "message": "m"}, kind=kind)


def gone(blame: Blame) -> Gone:
    return Gone(EngineDied("the engine ended"), blame)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (engine_failed("unsupported", "unable"), ReleaseReason.UNABLE),
        (engine_failed("out_of_memory", "device"), ReleaseReason.NO_MEMORY),
        (engine_failed("engine", "device"), ReleaseReason.SUSPECTED),
        (gone(Blame.GUILTY), ReleaseReason.CRASHED),
        (gone(Blame.SUSPECT), ReleaseReason.SUSPECTED),
        (gone(Blame.BESIDE), ReleaseReason.STOPPED),
    ],
)
def test_what_is_the_workers_fault_gives_the_job_back(answer: Answer, reason: ReleaseReason) -> None:
    world = World(answer=answer)
    assert world.run() is None
    assert world.released == [reason]
    assert world.finished == []


def test_what_is_the_jobs_fault_fails_it() -> None:
    world = World(answer=engine_failed("mask", "job"))
    assert isinstance(world.run(), Failed)
    assert world.released == []


def test_a_spec_that_cannot_be_read_here_is_left_for_a_newer_worker() -> None:
    world = World(spec=SPEC | {"version": 2})
    assert world.run() is None
    assert world.released == [ReleaseReason.UNABLE]


def test_a_cancelled_job_ends_as_cancelled() -> None:
    assert isinstance(World(answer=protocol.Cancelled(job="j", token=7)).run(), Cancelled)


def test_a_cancel_that_comes_with_the_result_wins_and_nothing_is_stored() -> None:
    world = World(on_render=lambda w: setattr(w.keeper.running[0], "cancelled", True))
    assert isinstance(world.run(), Cancelled)
    assert world.stored == {}


def test_a_job_that_was_cancelled_while_it_failed_ends_as_cancelled() -> None:
    assert isinstance(
        World(answer=engine_failed("input", "job"), ends_as=JobState.CANCELLED).run(), Cancelled
    )


def test_a_job_whose_claim_was_under_way_when_the_worker_left_goes_back_at_once() -> None:
    world = World()
    world.keeper.release_all()
    assert world.run() is None
    assert (world.released, world.rendered) == ([ReleaseReason.STOPPED], [])


def test_a_fenced_attempt_stores_and_commits_nothing() -> None:
    world = World(on_render=lambda w: setattr(w.keeper.running[0], "fenced", True))
    assert world.run() is None
    assert (world.stored, world.finished, world.released) == ({}, [], [])


def test_an_attempt_whose_token_is_old_deletes_what_it_wrote() -> None:
    world = World(accepts=False)
    assert world.run() is None
    wait_until(lambda: world.deleted == [("j", 7)])


def test_an_unexpected_error_is_counted_so_that_it_cannot_go_on_for_ever() -> None:
    def broken(world: World) -> None:
        raise RuntimeError("a bug")

    world = World(on_render=broken)
    assert world.run() is None
    assert world.released == [ReleaseReason.FAULT]
