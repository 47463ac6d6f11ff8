"""Decoding in processes of their own, which a hostile file may hang, crash or fill without harm to others.

They live as long as the engine and are started when they are first needed. One that is too slow, too large or
dead is replaced. A picture whose process somebody killed, the kernel say, is read once more in a fresh one.
Whatever one answers may be a hostile file's word: it is bounded and checked.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from overpaint_shared.errors import EngineDied, InputError, OutOfMemory, OverpaintError, PictureTooCostly
from overpaint_shared.settings import Limits

from .decoder_child import SEALS, receive, request, send
from .decoding import Decoded

WALL_S: Final = 120.0
"""For one picture, on however busy a machine; far below what the engine's watchdog allows a job."""
KEPT_VARIABLES: Final = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")
MODULE: Final = "overpaint_worker.engine.decoder_child"
NO_ROOM: Final = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
MOST_HEAD: Final = 64 * 1024
MOST_INFLATED: Final = 2**20
"""A profile is in the file as it is, or packed, and Pillow unpacks no more than that."""
MOST_CHANNELS: Final = 4


class Decoder:
    """One process."""

    def __init__(self, wall_s: float) -> None:
        self.taken = False
        """It has the whole picture."""
        self._wall_s = wall_s
        self._pipe, theirs = socket.socketpair()
        with theirs, ExitStack() as failing:
            failing.callback(self._pipe.close)
            self.process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
                | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            failing.pop_all()

    def ask(self, head: dict[str, Any], data: bytes, limits: Limits) -> Decoded | InputError:
        """Its answer. It may be a hostile file's by now, so whatever is no answer raises some exception."""
        self.taken = False
        self._pipe.settimeout(self._wall_s)
        send(self._pipe, head, data, [])
        self.taken = True
        until = time.monotonic() + self._wall_s
        answer, icc, descriptors = receive(self._pipe, (MOST_HEAD, len(data) + MOST_INFLATED), until)
        try:
            return (
                _error(answer["error"]) if "error" in answer else _decoded(answer, icc, descriptors, limits)
            )
        finally:
            for each in descriptors:
                os.close(each)

    def end(self) -> int:
        """End it for certain; its exit status."""
        with suppress(OSError):
            self.process.kill()
        self._pipe.close()
        return self.process.wait()


class Decoders:
    """Decodes as `decoding.decode` does; for any number of threads, each with a process while it decodes."""

    def __init__(self, wall_s: float = WALL_S, start: Callable[[float], Decoder] = Decoder) -> None:
        self._wall_s, self._start = wall_s, start
        self._idle: queue.LifoQueue[Decoder] = queue.LifoQueue()
        self._close = weakref.finalize(self, _end_all, self._idle)

    def warm(self) -> None:
        """Start one now, so that the first picture need not wait for it."""
        self._idle.put(self._start(self._wall_s))

    def close(self) -> None:
        """End all that are idle."""
        self._close()

    def __call__(
        self, data: bytes, limits: Limits, field: str, *, compat: bool = False, drop_keyed: bool = True
    ) -> Decoded:
        """See `decoding.decode`.

        Raises:
            InputError: as there. PictureTooCostly: it took too long or too much memory, or ended the process.
            OutOfMemory: there is no room for one more process. EngineDied: none can be started.

        """
        head, body = request(data, limits, field, compat=compat, drop_keyed=drop_keyed)
        found = self._asked(self._idle_one() or self._new(), head, body, limits)
        if isinstance(found, _Lost) and found.from_outside:
            found = self._asked(self._new(), head, body, limits)
        if isinstance(found, _Lost):
            raise found.told(field)
        if isinstance(found, InputError):
            raise found
        return found

    def _asked(
        self, decoder: Decoder, head: dict[str, Any], data: bytes, limits: Limits
    ) -> Decoded | InputError | _Lost:
        began = time.monotonic()
        try:
            found = decoder.ask(head, data, limits)
        except Exception as cause:
            return _lost(decoder, time.monotonic() - began, cause)
        self._idle.put(decoder)
        return found

    def _idle_one(self) -> Decoder | None:
        with suppress(queue.Empty):
            while True:
                found = self._idle.get_nowait()
                if found.process.poll() is None:
                    return found
                found.end()  # it died while it had nothing to do
        return None

    def _new(self) -> Decoder:
        try:
            return self._start(self._wall_s)
        except OSError as cause:
            message = f"no process for decoding can be started: {cause}"
            if cause.errno in NO_ROOM:
                fix = "give the worker room for more processes, open files and memory"
                raise OutOfMemory(message, fix=fix) from cause
            raise EngineDied(message) from cause


@dataclass(frozen=True)
class _Lost:
    """A process that gave no answer, and was ended."""

    why: str
    seconds: float
    from_outside: bool
    """The picture may be innocent: somebody killed the process, or it ended before it had the picture."""
    cause: Exception

    def told(self, field: str) -> PictureTooCostly:
        error = PictureTooCostly(
            f"decoding the picture {self.why}", field=field, value=round(self.seconds, 1),
            fix="open it in a picture editor and save it again as a PNG",
        )  # fmt: skip
        error.__cause__ = self.cause
        return error


def _lost(decoder: Decoder, seconds: float, cause: Exception) -> _Lost:
    with suppress(subprocess.TimeoutExpired):  # it closes its end just before it is gone
        decoder.process.wait(0.2)
    by_itself = decoder.process.returncode is not None
    status = decoder.end()
    if status == -signal.SIGXCPU or (not by_itself and isinstance(cause, TimeoutError)):
        why = f"took more than {seconds:.0f} s"
    elif by_itself:
        why = f"ended the process that read it (status {status})"
    else:
        why = f"gave no picture: {cause}"
    # No limit of its own ends it with these signals.
    killed = status in {-signal.SIGKILL, -signal.SIGTERM} or not decoder.taken
    return _Lost(why, seconds, by_itself and killed, cause)


def _error(said: Any) -> InputError:
    error = OverpaintError.from_json(said)
    if not isinstance(error, InputError):
        raise ValueError(f"it said {error.code!r}")  # noqa: TRY004 - the value is wrong, not its type
    return error


def _decoded(answer: dict[str, Any], icc: bytes, descriptors: list[int], limits: Limits) -> Decoded:
    height, width, channels = answer["shape"]
    kind = np.dtype({"uint8": np.uint8, "uint16": np.uint16}[answer["dtype"]])
    if min(height, width, channels) < 1 or height * width > limits.max_pixels or channels > MOST_CHANNELS:
        raise ValueError(f"it has the shape {answer['shape']}")
    (memory,) = descriptors
    if fcntl.fcntl(memory, fcntl.F_GET_SEALS) & SEALS != SEALS:  # else it could be cut, which ends its reader
        raise ValueError("its memory is not sealed")
    size = height * width * channels * kind.itemsize
    samples = np.frombuffer(mmap.mmap(memory, size, access=mmap.ACCESS_COPY), kind)
    notes = tuple(str(note) for note in answer["notes"])
    return Decoded(samples.reshape(height, width, channels), icc if answer["icc"] else None, notes)


def _end_all(idle: queue.LifoQueue[Decoder]) -> None:
    with suppress(queue.Empty):
        while True:
            idle.get_nowait().end()
