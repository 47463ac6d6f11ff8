"""An engine process: how it is started, the pipe to it, and how it ends."""

import errno
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from overpaint_worker.crashes import ANSWER_S, START_S, Hang, Watch
from overpaint_worker.engine_output import EngineOutput
from overpaint_worker.evidence import EvidenceMemory
from overpaint_worker.protocol import (
    CPU_STAGE_BUDGET_S,
    MAX_FRAME_BYTES,
    Begin,
    Cancel,
    Load,
    ProtocolError,
    Render,
    Stop,
    ToWorker,
    decode,
)

DRAIN_S = 1.0
PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TERM", "NO_COLOR", "FORCE_COLOR", "TMPDIR",
    "TEMP", "TMP", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD", "GLIBC_TUNABLES", "XDG_CACHE_HOME",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE",
    "GPU_MAX_HW_QUEUES",
)  # fmt: skip
PASSED_PREFIXES = (
    "LC_", "PYTHON", "MALLOC_", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "NCCL_", "HIP_", "HSA_", "ROCR_",
    "ROCM_", "ROCBLAS_", "MIOPEN_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "ONEDNN_",
    "DNNL_", "ATEN_",
    "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_",
)  # fmt: skip
"""What the engine needs of its worker's environment: its interpreter, its device's driver, its libraries."""

SECRET_WORDS = ("SECRET", "TOKEN", "PASSW", "CREDENTIAL", "AUTH", "KEY")
"""A name with one of these is passed only where the operator names it."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How an engine is started.

    `--fd N`, its end of the socket, and `--evidence N`, the memory for its evidence, are appended to `argv`.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    start_s: float = START_S
    answer_s: float = ANSWER_S
    cpu_stage_s: float = CPU_STAGE_BUDGET_S


class EngineProcess:
    """One engine process and its pipe."""

    def __init__(self, launch: Launch) -> None:
        """Start it. Raises OSError: there is no such program, or no room for one more process or thread."""
        self._evidence = EvidenceMemory()
        try:
            self.popen, self._connection = _begun(launch, self._evidence.descriptor)
        except OSError:
            self._evidence.close()
            raise
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sent = 0
        self.hung: Hang | None = None
        self.watch = Watch(
            started_at=time.monotonic(),
            start_s=launch.start_s,
            answer_s=launch.answer_s,
            cpu_stage_s=launch.cpu_stage_s,
        )
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        try:
            self._listen()
        except RuntimeError as cause:  # the system has no room for one more thread
            self._drop()
            raise OSError(errno.EAGAIN, str(cause)) from cause

    def _listen(self) -> None:
        self._writer.start()
        assert self.popen.stderr is not None  # noqa: S101 - a pipe was asked for
        self.output = EngineOutput(self.popen.stderr)

    def _drop(self) -> None:
        """End what has begun."""
        self._outbox.put(None)
        self.popen.kill()
        self.popen.wait()
        if self.popen.stderr is not None:
            self.popen.stderr.close()
        if self._writer.ident is not None:
            self._writer.join()
        self._connection.close()
        self._evidence.close()

    @property
    def stopped(self) -> bool:
        """A signal or a debugger holds it. False where the system does not say."""
        try:
            stat = Path(f"/proc/{self.popen.pid}/stat").read_bytes()
        except OSError:
            return False
        return stat.rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])

    def send(self, frame: bytes) -> int:
        """Queue a frame; its number on the pipe. For one thread at a time."""
        self._sent += 1
        self._outbox.put(frame)
        return self._sent

    def read(self) -> ToWorker:
        """The next message. Raises EOFError or OSError at the end, ProtocolError for what is none."""
        message = decode(self._connection.recv_bytes(MAX_FRAME_BYTES))
        if isinstance(message, Render | Cancel | Load | Stop | Begin):
            raise ProtocolError(f"the engine sent a {type(message).__name__} message")
        return message

    def waits_to_be_read(self) -> bool:
        """Whether `read` would return, or raise, at once."""
        return self._connection.poll()

    def reap(self) -> int:
        """End it for certain, and note what it was doing; its exit status."""
        self._outbox.put(None)
        self.popen.kill()
        status = self.popen.wait()
        self.watch.at_work = self._evidence.read()
        self._evidence.close()
        self.output.drain(DRAIN_S)
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


def _begun(launch: Launch, memory: int) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pipe = theirs.fileno()
        process = subprocess.Popen(
            [*launch.argv, "--fd", str(pipe), "--evidence", str(memory)],
            pass_fds=[pipe, memory],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=dict(launch.environment),
        )
        return process, Connection(ours.detach())


def engine_environment(visible_devices: str, more: Collection[str] = ()) -> dict[str, str]:
    """The engine's environment: pinned to its device before torch is imported.

    It holds only what an engine needs, and `more`, the names that the operator adds. So no secret of the farm
    gets in, whatever variable it came in.
    """
    kept = {name: value for name, value in os.environ.items() if name in more or _is_passed(name)}
    return kept | {"CUDA_VISIBLE_DEVICES": visible_devices}


def _is_passed(name: str) -> bool:
    if any(word in name.upper() for word in SECRET_WORDS):
        return False
    return name in PASSED or name.startswith(PASSED_PREFIXES)


def status_in_words(status: int) -> str:
    """How a process ended, by its exit status as `subprocess` gives it."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
