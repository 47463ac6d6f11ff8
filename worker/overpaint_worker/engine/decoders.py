"""Decoding in processes of their own, which a hostile file may hang, crash or fill without harm to others.

They live as long as the engine and are started when they are first needed. One that is too slow, too large or
dead is replaced.
"""

from __future__ import annotations

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
from contextlib import suppress
from typing import Any, Final

import numpy as np

from overpaint_shared.errors import EngineDied, OverpaintError, PictureTooCostly
from overpaint_shared.settings import Limits

from .decoder_child import receive, request, send
from .decoding import Decoded

WALL_S: Final = 120.0
"""For one picture, on however busy a machine; far below what the engine's watchdog allows a job."""
KEPT_VARIABLES: Final = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")
MODULE: Final = "overpaint_worker.engine.decoder_child"


class Decoder:
    """One process."""

    def __init__(self, wall_s: float) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
                | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        ours.settimeout(wall_s)
        self._pipe = ours

    def ask(self, head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes, list[int]]:
        """Its answer. Raises EOFError, OSError: it died, or said nothing in time."""
        send(self._pipe, head, data, [])
        return receive(self._pipe)

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
            EngineDied: no such process can be started.

        """
        decoder = self._decoder()
        head, body = request(data, limits, field, compat=compat, drop_keyed=drop_keyed)
        began = time.monotonic()
        try:
            answer, icc, descriptors = decoder.ask(head, body)
        except (EOFError, OSError, ValueError) as cause:
            raise self._lost(decoder, field, time.monotonic() - began) from cause
        self._idle.put(decoder)
        if "error" in answer:
            raise OverpaintError.from_json(answer["error"])
        return _decoded(answer, icc, descriptors)

    def _decoder(self) -> Decoder:
        while True:
            try:
                found = self._idle.get_nowait()
            except queue.Empty:
                break
            if found.process.poll() is None:
                return found
            found.end()  # it died while it had nothing to do
        try:
            return self._start(self._wall_s)
        except OSError as cause:
            raise EngineDied(f"no process for decoding can be started: {cause}") from cause

    def _lost(self, decoder: Decoder, field: str, seconds: float) -> PictureTooCostly:
        with suppress(subprocess.TimeoutExpired):  # it closes its end just before it is gone
            decoder.process.wait(0.2)
        status = decoder.end()
        if seconds >= self._wall_s or status == -signal.SIGXCPU:
            why = f"took more than {seconds:.0f} s"
        else:
            why = f"ended the process that read it (status {status})"
        return PictureTooCostly(
            f"decoding the picture {why}", field=field, value=round(seconds, 1),
            fix="open it in a picture editor and save it again as a PNG",
        )  # fmt: skip


def _decoded(answer: dict[str, Any], icc: bytes, descriptors: list[int]) -> Decoded:
    (memory,) = descriptors
    try:
        held = mmap.mmap(memory, os.fstat(memory).st_size)
    finally:
        os.close(memory)
    samples = np.frombuffer(held, answer["dtype"]).reshape(answer["shape"])
    return Decoded(samples, icc if answer["icc"] else None, tuple(answer["notes"]))


def _end_all(idle: queue.LifoQueue[Decoder]) -> None:
    with suppress(queue.Empty):
        while True:
            idle.get_nowait().end()
