from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from overpaint_shared.errors import StoreUnreachable
from overpaint_shared.settings import Settings
from overpaint_worker import node, transport
from overpaint_worker.cycle import Intake, ModelCycle
from overpaint_worker.keeper import Attempt
from overpaint_worker.options import WorkerOptions
from overpaint_worker.storage import Storage
from tests.waiting import wait_until

QUEUES = ["m.a", "m.b", "host.celery.pidbox"]


@dataclass
class World:
    now: float = 0.0
    held: int = 0
    intake: Intake = field(init=False)

    def __post_init__(self) -> None:
        self.intake = Intake(
            {"m.a": "a", "m.b": "b"},
            slots=4,
            held=lambda: self.held,
            switch_after_s=10,
            clock=lambda: self.now,
        )
        self.intake.engine_up = True

    def take(self, queue: str) -> None:
        self.intake.taken(queue)
        self.held += 1

    def models(self) -> list[str]:
        return [q for q in self.intake.choose(QUEUES) if q.startswith("m.")]


def test_an_idle_worker_listens_to_all_models() -> None:
    assert sorted(World().models()) == ["m.a", "m.b"]


def test_the_first_message_opens_its_model_and_closes_the_others() -> None:
    world = World()
    world.take("m.b")
    assert world.models() == ["m.b"]


def test_an_idle_worker_asks_its_open_model_first() -> None:
    world = World()
    world.take("m.b")
    world.held = 0
    assert world.models() == ["m.b", "m.a"]


def test_a_full_worker_takes_nothing_until_a_job_ends() -> None:
    world = World()
    for _ in range(4):
        world.take("m.a")
    assert world.models() == []
    world.held -= 1
    assert world.models() == ["m.a"]


def test_credits_of_the_engine_limit_what_is_held_below_the_slots() -> None:
    world = World()
    world.intake.credits = 2
    world.take("m.a")
    assert world.models() == ["m.a"]
    world.take("m.a")
    assert world.models() == []


def test_more_credits_than_slots_change_nothing() -> None:
    world = World()
    world.intake.credits = 99
    world.held = 4
    assert world.models() == []


def test_no_credits_still_let_one_job_in() -> None:
    world = World()
    world.intake.credits = 0
    assert world.models() == ["m.a", "m.b"]


def test_a_model_that_waited_long_enough_makes_the_worker_drain_and_then_comes_first() -> None:
    world = World()
    world.take("m.a")
    world.now = 10.0
    assert world.models() == ["m.a"], "nothing else waits"
    world.intake.waiting = {"b": 10.0}
    assert world.models() == []
    world.held = 0
    assert world.models() == ["m.b", "m.a"]


def test_a_model_is_held_for_its_time_even_if_another_has_waited_longer() -> None:
    world = World()
    world.intake.waiting = {"b": 1000.0}
    world.take("m.a")
    world.now = 9.9
    assert world.models() == ["m.a"]


def test_a_late_model_without_messages_does_not_end_batching() -> None:
    """Its jobs may be ones that this worker cannot render."""
    world = World()
    world.intake.waiting = {"b": 1000.0}
    world.now = 50.0
    world.take("m.a")
    assert world.models() == ["m.a"]


def test_a_draining_worker_and_one_without_an_engine_take_nothing_but_answer() -> None:
    world = World()
    world.intake.draining = True
    assert world.intake.choose(QUEUES) == ["host.celery.pidbox"]
    world.intake.draining = False
    world.intake.engine_up = False
    assert world.intake.choose(QUEUES) == ["host.celery.pidbox"]


def test_the_cycle_that_kombu_makes_asks_the_intake() -> None:
    world = World()
    world.held = 4
    cycle = ModelCycle(list(QUEUES))
    assert cycle.consume(3) == QUEUES, "without a worker it is kombu's own"
    try:
        ModelCycle.intake = world.intake
        assert cycle.consume(3) == ["host.celery.pidbox"]
    finally:
        ModelCycle.intake = None


def test_of_several_other_models_the_one_that_waited_longest_comes_first() -> None:
    held = 0
    intake = Intake(
        {f"m.{name}": name for name in "abc"},
        slots=4,
        held=lambda: held,
        switch_after_s=10,
        clock=lambda: 99.0,
    )
    intake.engine_up = True
    intake._since = 0.0
    intake.open_queue = "m.a"
    intake.waiting = {"a": 50.0, "b": 20.0, "c": 40.0}
    assert intake.choose(["m.a", "m.b", "m.c"]) == ["m.c", "m.b", "m.a"]
    intake.waiting = {"a": 5.0, "b": 2.0, "c": 4.0}
    assert intake.choose(["m.a", "m.b", "m.c"]) == ["m.a", "m.c", "m.b"]


class Overtaken(Storage):
    """Another thread changes it just after it was asked."""

    between: Callable[[], None] | None = None

    @property
    def blocked(self) -> bool:
        was = super().blocked
        if self.between:
            happens, self.between = self.between, None
            happens()
        return was


def test_a_worker_takes_jobs_again_though_s3_came_back_while_it_was_said_to_be_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "install", lambda _: None)
    monkeypatch.setattr(ModelCycle, "intake", None)
    monkeypatch.setattr(node, "Storage", Overtaken)
    world = node.Node(WorkerOptions(device="cpu", models=("a",), registry=Path("none")), Settings())
    store = cast("Any", world.storage)
    world.intake.engine_up = True

    def fails() -> None:
        raise StoreUnreachable("S3 does not answer")

    def back() -> None:
        world.storage.patiently(lambda: None, 1, Attempt("other", 1), "store")

    store.between = back
    with pytest.raises(StoreUnreachable):
        world.storage.patiently(fails, 0, Attempt("j", 1), "store")
    wait_until(lambda: not world.intake.closed, 2)
