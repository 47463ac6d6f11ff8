import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from overpaint_shared.restart import Restart
from overpaint_worker import supervisor
from overpaint_worker.supervisor import Supervisor, visible_devices, worker_command
from tests.waiting import wait_until


def test_each_worker_gets_its_own_device_and_the_other_options() -> None:
    given = ["--models", "a,b", "--device", "all", "--slots", "4"]
    assert worker_command(given, "cuda:1")[3:] == ["--device", "cuda:1", "--models", "a,b", "--slots", "4"]
    assert worker_command(["--device=all", "--json-logs"], "cpu")[3:] == ["--device", "cpu", "--json-logs"]


def test_workers_of_one_host_never_share_a_name() -> None:
    given = ["--name", "render", "--device", "all"]
    assert worker_command(given, "cuda:1", name="render")[-2:] == ["--name", "render-cuda1"]


def test_pauses_double_up_to_a_minute_and_start_anew_after_a_steady_life() -> None:
    restart = Restart()
    assert [restart.pause_s(1.0) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert restart.pause_s(60.0) == 1


def test_a_machine_without_cuda_gets_one_worker_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overpaint_worker.supervisor._COUNT", "print(0)")
    assert visible_devices() == ["cpu"]
    monkeypatch.setattr("overpaint_worker.supervisor._COUNT", "raise SystemExit(1)")
    assert visible_devices() == ["cpu"]
    monkeypatch.setattr("overpaint_worker.supervisor._COUNT", "print(3)")
    assert visible_devices() == ["cuda:0", "cuda:1", "cuda:2"]


class World:
    """A supervisor of small programs that write down their lives."""

    def __init__(self, folder: Path, **programs: str) -> None:
        self.folder = folder
        self.now = 0.0
        begin = "import sys, time, signal, pathlib\nlife = pathlib.Path(sys.argv[1])\n"
        begin += "life.open('a').write('born ')\n"
        self.supervisor = Supervisor(
            [(d, [sys.executable, "-c", begin + code, str(folder / d)]) for d, code in programs.items()],
            clock=lambda: self.now,
        )

    def life(self, device: str) -> str:
        path = self.folder / device
        return path.read_text() if path.exists() else ""

    def until(self, condition: Callable[[], bool]) -> None:
        wait_until(lambda: self.supervisor.step() or condition())


WAITS = """
def end(*_):
    life.open('a').write('ended ')
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
life.open('a').write('ready ')
signal.pause()
"""


def test_a_worker_that_fails_is_started_again_after_its_pause_and_not_before(tmp_path: Path) -> None:
    world = World(tmp_path, cpu="sys.exit(4)")
    world.until(lambda: world.supervisor._posts[0].due > 0)
    world.supervisor.step()
    assert world.life("cpu") == "born "
    world.now = world.supervisor._posts[0].due
    world.until(lambda: world.life("cpu") == "born born ")
    world.supervisor._signalled(signal.SIGTERM, None)
    wait_until(world.supervisor.step)


@pytest.mark.parametrize("code", [0, 2])
def test_a_worker_that_stopped_as_asked_or_was_wrongly_called_stays_ended(tmp_path: Path, code: int) -> None:
    world = World(tmp_path, cpu=f"sys.exit({code})")
    wait_until(world.supervisor.step)
    assert world.life("cpu") == "born "
    assert world.supervisor._posts[0].code == code


def test_a_signal_reaches_all_workers_and_ends_the_supervisor(tmp_path: Path) -> None:
    world = World(tmp_path, one=WAITS, two=WAITS)
    world.until(lambda: all("ready" in world.life(d) for d in ("one", "two")))
    world.supervisor._signalled(signal.SIGTERM, None)
    wait_until(world.supervisor.step)
    assert world.life("one") == world.life("two") == "born ready ended "


def test_a_worker_that_waits_for_its_restart_is_not_started_after_a_stop(tmp_path: Path) -> None:
    world = World(tmp_path, cpu="sys.exit(4)")
    world.until(lambda: world.supervisor._posts[0].due > 0)
    world.supervisor._signalled(signal.SIGTERM, None)
    wait_until(world.supervisor.step)  # without waiting for the pause to end
    assert world.life("cpu") == "born "


def test_each_worker_serves_its_metrics_on_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(supervisor, "visible_devices", lambda: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(Supervisor, "run", lambda self: commands.extend(p.command for p in self._posts) or 0)
    assert supervisor.supervise(["--device", "all", "--metrics-port", "9808"], 9808) == 0
    assert [command[-1] for command in commands] == ["9808", "9809"]
    supervisor.supervise(["--device", "all"], None)
    assert "--metrics-port" not in commands[-1]


def test_a_worker_that_the_machine_cannot_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, cpu="")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as full:
        full.setattr(
            "overpaint_worker.supervisor.subprocess.Popen",
            refuse,
        )
        assert not world.supervisor.step()
    assert not world.supervisor.step()
    assert world.life("cpu") == ""
    world.now += 1
    world.until(lambda: False)  # until it has ended
    assert world.life("cpu") == "born "
