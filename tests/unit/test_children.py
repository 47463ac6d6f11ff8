"""A child that ends by itself is started again, not for ever."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from overpaint_producer.children import GIVE_UP_AFTER, Child, Kept
from overpaint_shared.errors import ServiceError


@dataclass
class Fake:
    """A program whose life the test decides."""

    name: str = "worker"
    alive: bool = True
    log: Path = Path("worker.log")
    process: Any = field(default_factory=lambda: type("Process", (), {"returncode": 1}))

    def tail(self) -> str:
        return "the last line"


class Farm:
    def __init__(self) -> None:
        self.now = 0.0
        self.started = 0
        self.refuse = False
        self.kept = Kept(cast("Child", Fake()), self.again, clock=lambda: self.now)

    def again(self) -> Child:
        if self.refuse:
            raise ServiceError("Redis did not answer within 30 s.\nlog")
        self.started += 1
        return cast("Child", Fake())

    def die(self, after_s: float = 0.0) -> str | None:
        self.now += after_s
        cast("Fake", self.kept.child).alive = False
        return self.kept.step()


def test_it_is_left_alone_while_it_lives() -> None:
    farm = Farm()
    assert farm.kept.step() is None
    assert farm.started == 0


def test_it_is_started_again_after_its_pause_and_not_before() -> None:
    farm = Farm()
    assert farm.die() == "worker ended by itself (status 1); it is started again in 1 s"
    farm.now += 0.9
    assert farm.kept.step() is None
    assert farm.started == 0
    farm.now += 0.1
    assert farm.kept.step() == "worker was started again"
    assert farm.started == 1


def test_pauses_grow_and_it_is_given_up_when_it_ends_again_and_again() -> None:
    farm = Farm()
    for number in range(GIVE_UP_AFTER):
        assert f"again in {2**number} s" in str(farm.die())
        farm.now += 2**number
        farm.kept.step()
    with pytest.raises(ServiceError, match=r"6 times, each within 60 s of its start(.|\n)*the last line"):
        farm.die()


def test_a_steady_minute_makes_it_trusted_again() -> None:
    farm = Farm()
    for _ in range(3 * GIVE_UP_AFTER):
        assert "again in 1 s" in str(farm.die(after_s=60.0))
        farm.now += 1
        farm.kept.step()


def test_a_start_that_fails_counts_as_an_end() -> None:
    farm = Farm()
    farm.die()
    farm.refuse = True
    farm.now += 1
    assert farm.kept.step() == (
        "worker ended by itself (Redis did not answer within 30 s.); it is started again in 2 s"
    )


@pytest.mark.parametrize("error", [OSError(28, "No space"), ValueError("keys.json\nis damaged")])
def test_a_start_that_the_machine_refuses_is_tried_again(error: Exception) -> None:
    farm = Farm()

    def refused() -> Child:
        raise error

    farm.kept.again = refused
    farm.die()
    farm.now += 1
    assert str(error).partition("\n")[0] in str(farm.kept.step())
    farm.kept.again = farm.again
    farm.now += 2
    assert farm.kept.step() == "worker was started again"
