import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from overpaint_worker.stopping import EXIT_DEVICE_FAULT, SETTLE_S, SIGNALS, Drain
from tests.waiting import wait_until


@dataclass
class World:
    now: float = 100.0
    running: int = 2
    hanging: int = 0
    told: list[str] = field(default_factory=list)

    def close_intake(self) -> None:
        self.told.append("closed")

    def busy(self) -> int:
        return self.running + self.hanging

    def release_all(self) -> int:
        self.told.append("released")
        count, self.running = self.running, 0
        return count

    def leave(self, exit_code: int) -> None:
        self.told.append(f"left {exit_code}")


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def drain(world: World) -> Iterator[Drain]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    made = Drain(world, grace_s=5.0, clock=lambda: world.now)
    for number in SIGNALS:
        signal.signal(number, made._count)
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_happens_until_a_signal_comes(world: World, drain: Drain) -> None:
    assert drain.step() is False
    assert world.told == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_closes_the_intake_and_waits_for_what_runs(world: World, drain: Drain, number: int) -> None:
    os.kill(os.getpid(), number)
    assert drain.step() is False
    world.now += 4.9
    assert drain.step() is False
    assert world.told == ["closed"]
    world.running = 0
    assert drain.step() is True
    assert world.told == ["closed"], "nothing was given back"


def test_the_rest_is_given_back_when_the_grace_ends(world: World, drain: Drain) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    drain.step()
    world.now += 5.0
    drain.step()
    assert world.told == ["closed", "released"]
    assert drain.step() is True


def test_a_second_signal_gives_back_now(world: World, drain: Drain) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    drain.step()
    os.kill(os.getpid(), signal.SIGTERM)
    drain.step()
    assert world.told == ["closed", "released"]


def test_a_thread_that_hangs_is_left_behind_after_a_second(world: World, drain: Drain) -> None:
    world.hanging = 1
    os.kill(os.getpid(), signal.SIGTERM)
    drain.step()
    os.kill(os.getpid(), signal.SIGTERM)
    assert drain.step() is False
    assert drain.step() is False
    world.now += SETTLE_S
    assert drain.step() is True
    assert world.told == ["closed", "released"], "given back once"


def test_a_device_at_fault_ends_the_worker_without_grace(world: World, drain: Drain) -> None:
    drain.fail("three crashes")
    drain._run()
    assert world.told == ["closed", "released", f"left {EXIT_DEVICE_FAULT}"]


def test_a_stop_that_was_asked_for_exits_with_zero(world: World, drain: Drain) -> None:
    world.running = 0
    os.kill(os.getpid(), signal.SIGINT)
    drain._run()
    assert world.told == ["closed", "left 0"]


def test_a_defect_while_it_stops_does_not_keep_the_worker_for_ever(world: World, drain: Drain) -> None:
    def broken() -> int:
        world.now += SETTLE_S
        raise RuntimeError("a bug")

    world.release_all = broken  # type: ignore[method-assign]
    drain.fail("its device is gone")
    drain._thread.start()
    assert drain.left.wait(10)
    wait_until(lambda: world.told[-1:] == [f"left {EXIT_DEVICE_FAULT}"])
