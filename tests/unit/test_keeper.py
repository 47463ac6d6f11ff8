"""The keeper of leases against a ledger in memory; the real one is in the integration tests."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import pytest

from overpaint_shared.errors import LedgerUnreachable
from overpaint_shared.ledger import Beat, JobState, Ledger, Released, ReleaseReason, Wakeup
from overpaint_worker.keeper import PROGRESS_EVERY_S, Attempt, Keeper
from tests.waiting import wait_until


@dataclass
class FakeLedger:
    calls: list[tuple[float, list[Beat]]] = field(default_factory=list)
    verdicts: dict[str, str] = field(default_factory=dict)
    away: bool = False
    released: list[tuple[str, int, ReleaseReason]] = field(default_factory=list)

    def renew(self, worker_id: str, beats: Sequence[Beat]) -> dict[str, str]:
        self.calls.append((time.monotonic(), list(beats)))
        if self.away:
            raise LedgerUnreachable("Redis does not answer")
        return {beat.job_id: self.verdicts.get(beat.job_id, "ok") for beat in beats}

    def release(self, job: str, token: int, reason: ReleaseReason, detail: str = "") -> Released:
        if self.away:
            raise LedgerUnreachable("Redis does not answer")
        self.released.append((job, token, reason))
        return Released(JobState.QUEUED, (Wakeup(job, "tiny", 3, "title"),))


@dataclass
class World:
    ledger: FakeLedger = field(default_factory=FakeLedger)
    published: list[Wakeup] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    fenced: list[str] = field(default_factory=list)
    keeper: Keeper = field(init=False)

    def __post_init__(self) -> None:
        self.keeper = self.make(renew_s=0.05)

    def make(self, renew_s: float) -> Keeper:
        return Keeper(
            cast("Ledger", self.ledger),
            "me",
            renew_s=renew_s,
            publish=self.published.extend,
            on_cancel=lambda a: self.cancelled.append(a.job),
            on_fenced=lambda a: self.fenced.append(a.job),
        )


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.keeper.stop()


def test_one_call_renews_all_jobs_and_carries_their_latest_progress(world: World) -> None:
    with world.keeper.watching("a", 1), world.keeper.watching("b", 2):
        world.keeper.progress("a", 1, "denoise", 3, 20)
        world.keeper.progress("a", 1, "denoise", 4, 20)
        world.keeper._renew()
    ((_, beats),) = world.ledger.calls
    assert [(b.job_id, b.token, b.stage, b.step, b.of) for b in beats] == [
        ("a", 1, "denoise", 4, 20),
        ("b", 2, "fetch", 0, 0),
    ]


def test_progress_of_another_attempt_is_not_told(world: World) -> None:
    with world.keeper.watching("a", 2) as attempt:
        world.keeper.progress("a", 1, "denoise", 9, 9)
        assert attempt.stage == "fetch"


def test_nothing_is_asked_while_nothing_runs(world: World) -> None:
    world.keeper._renew()
    assert world.ledger.calls == []


def test_progress_is_told_soon_but_at_most_twice_a_second(world: World) -> None:
    keeper = world.make(renew_s=1000.0)
    keeper.start()
    with keeper.watching("a", 1):
        telling = threading.Event()

        def tell() -> None:
            step = 0
            while not telling.wait(0.002):
                step += 1
                keeper.progress("a", 1, "denoise", step, 0)

        teller = threading.Thread(target=tell)
        teller.start()
        wait_until(lambda: len(world.ledger.calls) >= 4)
        telling.set()
        teller.join()
    keeper.stop()
    times = [at for at, _ in world.ledger.calls[1:]]  # the first call may be the keeper's first renewal
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) >= PROGRESS_EVERY_S * 0.9


def test_a_cancel_is_passed_on_once_and_the_lease_kept(world: World) -> None:
    world.ledger.verdicts["a"] = "cancel"
    with world.keeper.watching("a", 1) as attempt:
        for _ in range(3):
            world.keeper._renew()
        assert attempt.cancelled
    assert world.cancelled == ["a"]
    assert len(world.ledger.calls) == 3


def test_a_lost_lease_drops_the_job_and_is_renewed_no_more(world: World) -> None:
    world.ledger.verdicts["a"] = "lost"
    with world.keeper.watching("a", 1) as attempt:
        for _ in range(3):
            world.keeper._renew()
        assert attempt.fenced
    assert world.fenced == ["a"]
    assert len(world.ledger.calls) == 1


def test_a_job_whose_end_is_being_told_is_not_taken_for_lost(world: World) -> None:
    world.ledger.verdicts["a"] = "lost"
    with world.keeper.watching("a", 1) as attempt:
        attempt.settling = True
        world.keeper._renew()
        assert not attempt.fenced


def test_while_the_ledger_is_away_jobs_run_on(world: World) -> None:
    world.ledger.away = True
    with world.keeper.watching("a", 1) as attempt:
        world.keeper._renew()
        world.keeper._renew()
        world.ledger.away = False
        world.keeper._renew()
        assert not attempt.fenced
    assert world.fenced == []
    assert len(world.ledger.calls) == 3


def test_an_unexpected_error_does_not_end_the_keeping_of_leases(world: World) -> None:
    renew = world.ledger.renew

    def broken(worker_id: str, beats: Sequence[Beat]) -> dict[str, str]:
        renew(worker_id, beats)
        raise RuntimeError("a bug")

    world.ledger.renew = broken  # type: ignore[method-assign]
    with world.keeper.watching("a", 1):
        world.keeper.start()
        wait_until(lambda: len(world.ledger.calls) >= 2, what="it renews again")


def test_releasing_all_gives_each_back_once_wakes_others_and_drops_them_here(world: World) -> None:
    with world.keeper.watching("a", 1), world.keeper.watching("b", 2):
        assert world.keeper.release_all() == 2
        assert world.keeper.release_all() == 0
        world.keeper._renew()
    assert world.ledger.released == [("a", 1, ReleaseReason.STOPPED), ("b", 2, ReleaseReason.STOPPED)]
    assert [w.job_id for w in world.published] == ["a", "b"]
    assert world.fenced == ["a", "b"]
    assert world.ledger.calls == [], "what was given back is not renewed"


def test_jobs_are_dropped_though_the_ledger_is_away(world: World) -> None:
    world.ledger.away = True
    with world.keeper.watching("a", 1):
        assert world.keeper.release_all() == 0
    assert world.fenced == ["a"]


def test_a_second_attempt_at_a_job_is_not_forgotten_when_the_first_ends(world: World) -> None:
    first: Any = world.keeper.watching("a", 1)
    first.__enter__()
    with world.keeper.watching("a", 2):
        first.__exit__(None, None, None)
        assert [a.token for a in world.keeper.running] == [2]


def test_an_attempts_beat_has_its_token() -> None:
    assert Attempt("a", 7, "denoise", 1, 2).beat() == Beat(job_id="a", token=7, stage="denoise", step=1, of=2)
