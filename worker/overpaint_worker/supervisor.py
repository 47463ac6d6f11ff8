"""`--device all`: one worker process for each CUDA device, under one supervisor that passes signals on.

A worker that fails is started again, with a growing pause. A worker ends with its supervisor, however that
ends.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FrameType

import structlog

from overpaint_shared.restart import Restart
from overpaint_worker.options import CPU
from overpaint_worker.parent import end_with_parent

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TICK_S = 0.1
DEVICES_TIMEOUT_S = 120
NOT_RESTARTED = (0, 2)
"""Stopped as asked, or a wrong option or setting, which no restart mends."""

_COUNT = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"

log = structlog.get_logger(__name__)


def visible_devices() -> list[str]:
    """`cuda:0` ..., asked of torch in a process of its own; `cpu` where there is none."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _COUNT],
            capture_output=True,
            text=True,
            timeout=DEVICES_TIMEOUT_S,
            check=True,
        )
        count = int(asked.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        log.warning("devices cannot be counted", action="supervisor.no_count", error=str(error))
        count = 0
    if not count:
        log.warning("no CUDA device is visible: one worker on the CPU", action="supervisor.cpu")
        return [CPU]
    return [f"cuda:{index}" for index in range(count)]


def worker_command(
    arguments: Sequence[str], device: str, metrics_port: int | None = None, name: str | None = None
) -> list[str]:
    """The command of one worker: the supervisor's own, but with its own device, port and name."""
    out: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--device":
            next(rest)
        elif not argument.startswith("--device="):
            out.append(argument)
    # Of an option given twice, the last one counts.
    out += [] if metrics_port is None else ["--metrics-port", str(metrics_port)]
    out += [] if name is None else ["--name", f"{name}-{device.replace(':', '')}"]
    return [sys.executable, "-m", "overpaint_worker.main", "--device", device, *out]


@dataclass
class _Post:
    """One device and the worker on it."""

    device: str
    command: Sequence[str]
    popen: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    due: float = 0.0
    code: int | None = None
    restart: Restart = field(default_factory=Restart)

    @property
    def over(self) -> bool:
        return self.code is not None


class Supervisor:
    """Keeps a worker on each device until it is told to stop."""

    def __init__(
        self, commands: Sequence[tuple[str, Sequence[str]]], clock: Callable[[], float] = time.monotonic
    ):
        self._posts = [_Post(device, command) for device, command in commands]
        self._clock = clock
        self._signals: list[int] = []
        self._stopping = threading.Event()

    def run(self) -> int:
        """Run until all workers have ended; the first exit code that is not 0. Main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._signalled)
        while not self.step():
            time.sleep(TICK_S)
        return next((post.code for post in self._posts if post.code), 0)

    def step(self) -> bool:
        """Pass signals on, note who ended, start who is due; True when all is over."""
        while self._signals:
            self._stopping.set()
            self._pass_on(self._signals.pop(0))
        for post in self._posts:
            self._look_after(post)
        return all(post.over for post in self._posts)

    def _look_after(self, post: _Post) -> None:
        if post.popen is not None:
            status = post.popen.poll()
            if status is None:
                return
            self._ended(post, status)
        if not post.over and (self._stopping.is_set() or self._clock() >= post.due):
            self._start(post)

    def _ended(self, post: _Post, status: int) -> None:
        post.popen = None
        if self._stopping.is_set() or status in NOT_RESTARTED:
            post.code = max(status, 0) if status >= 0 else 128 - status
            log.info("worker ended", action="supervisor.ended", device=post.device, status=status)
            return
        pause = self._pause(post)
        log.warning(
            "worker failed", action="supervisor.failed", device=post.device, status=status, again_in_s=pause
        )

    def _pause(self, post: _Post) -> float:
        pause = post.restart.pause_s(self._clock() - post.started)
        post.due = self._clock() + pause
        return pause

    def _start(self, post: _Post) -> None:
        if self._stopping.is_set():
            post.code = 0
            return
        post.started = self._clock()
        # Their own process groups: a terminal's Ctrl-C must reach them once, from here, not twice.
        try:
            post.popen = subprocess.Popen(
                post.command,
                process_group=0,
                preexec_fn=partial(_end_with, os.getpid()),  # noqa: PLW1509  # no other threads are here
            )
        except (OSError, subprocess.SubprocessError) as error:  # no memory or no process is left now
            pause = self._pause(post)
            log.warning(
                "worker cannot be started",
                action="supervisor.failed", device=post.device, error=str(error), again_in_s=pause,
            )  # fmt: skip
            return
        log.info("worker started", action="supervisor.started", device=post.device, worker_pid=post.popen.pid)

    def _pass_on(self, number: int) -> None:
        log.info("signal passed on", action="supervisor.signal", signal=signal.Signals(number).name)
        for post in self._posts:
            if post.popen is not None and post.popen.poll() is None:
                post.popen.send_signal(number)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)


def _end_with(parent: int) -> None:
    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(0)


def supervise(arguments: Sequence[str], metrics_port: int | None = None, name: str | None = None) -> int:
    """Run one worker on each visible device with these command line arguments; the exit code.

    The first serves its metrics on `metrics_port`, each further one a port higher (0: each on a free one).
    With `name` each is called that and its device: Celery tells its nodes apart by name.
    """
    log.info("supervisor started", action="supervisor.up", supervisor_pid=os.getpid())
    commands = [
        (device, worker_command(arguments, device, metrics_port and metrics_port + number, name))
        for number, device in enumerate(visible_devices())
    ]
    return Supervisor(commands).run()
