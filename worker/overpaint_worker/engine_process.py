"""An engine process: how it is started, the pipe to it, and how it ends."""

import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from overpaint_worker.crashes import ANSWER_S, START_S, Watch
from overpaint_worker.protocol import (
    CPU_STAGE_BUDGET_S,
    MAX_FRAME_BYTES,
    Cancel,
    Load,
    ProtocolError,
    Render,
    Stop,
    ToWorker,
    decode,
)

SECRET_VARIABLES = ("OVERPAINT_REDIS_URL", "OVERPAINT_S3_ACCESS_KEY", "OVERPAINT_S3_SECRET_KEY")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How an engine is started. Its end of the socket is appended to `argv` as `--fd N`."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    start_s: float = START_S
    answer_s: float = ANSWER_S
    cpu_stage_s: float = CPU_STAGE_BUDGET_S


class EngineProcess:
    """One engine process and its pipe."""

    def __init__(self, launch: Launch) -> None:
        """Start it. Raises OSError: there is no such program, or no room for one more process."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.popen = subprocess.Popen(
                [*launch.argv, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=dict(launch.environment),
            )
            self._connection = Connection(ours.detach())
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.hung: str | None = None
        self.watch = Watch(
            started_at=time.monotonic(),
            start_s=launch.start_s,
            answer_s=launch.answer_s,
            cpu_stage_s=launch.cpu_stage_s,
        )
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._writer.start()

    def send(self, frame: bytes) -> None:
        """Queue a frame."""
        self._outbox.put(frame)

    def read(self) -> ToWorker:
        """The next message. Raises EOFError or OSError at the end, ProtocolError for what is none."""
        message = decode(self._connection.recv_bytes(MAX_FRAME_BYTES))
        if isinstance(message, Render | Cancel | Load | Stop):
            raise ProtocolError(f"the engine sent a {type(message).__name__} message")
        return message

    def reap(self) -> int:
        """End it for certain; its exit status."""
        self._outbox.put(None)
        self.popen.kill()
        status = self.popen.wait()
        self._writer.join()  # its descriptor must not be closed, and taken by another, under its hands
        self._connection.close()
        return status

    def leave(self, within_s: float) -> None:
        """Wait for it to end by itself, then kill it."""
        try:
            self.popen.wait(within_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()

    def _write(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                self._connection.send_bytes(frame)
            except OSError:  # it is gone, the keeper sees the end of the pipe
                return


def engine_environment(visible_devices: str) -> dict[str, str]:
    """The engine's environment: pinned to its device before torch is imported, and without the farm's
    secrets.
    """
    kept = {k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES and not k.startswith("AWS_")}
    return kept | {"CUDA_VISIBLE_DEVICES": visible_devices}


def status_in_words(status: int) -> str:
    """How a process ended, by its exit status as `subprocess` gives it."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
