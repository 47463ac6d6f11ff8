"""What each thread of an engine is about to do, in memory that outlives the engine.

The worker makes the memory, the engine inherits it by descriptor, and the worker reads it when the engine has
ended. The messages over the pipe cannot tell who was at work: the last of them are lost with the engine.
Nothing here makes a system call while the engine works.

Each thread has a slot of its own:

    8 bytes: a number that is odd while the slot is being written | 4 bytes: length | 4 bytes: CRC-32
    JSON: [stage, [[job, token], ...], frame]

A thread whose slot was being written had done the one thing and not begun the other: it was at nothing.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

IDLE: Final = "idle"
TAKE: Final = "take"
SLOTS: Final = 64
SLOT_BYTES: Final = 16_384
"""Enough for the jobs of the largest unit of work."""
_NUMBER = struct.Struct("=Q")
_BODY = struct.Struct("=II")
_HEAD_BYTES: Final = _NUMBER.size + _BODY.size
_REST: Final = b""
_UNTOLD: Final = b"?"
"""In the place of what does not fit: the worker then suspects all jobs of the engine."""

Attempt = tuple[str, int]
"""A job and its fencing token."""


@dataclass(frozen=True)
class AtWork:
    """What an engine was doing when it ended."""

    attempts: frozenset[Attempt] = frozenset()
    frames: frozenset[int] = frozenset()
    """Those that it was reading: numbers of the frames on the pipe, from 1."""
    rests: bool = False
    """It had nothing to do."""

    def has(self, attempt: Attempt, frame: int) -> bool:
        """Whether it was at work on an attempt, which it was sent in that frame."""
        return attempt in self.attempts or frame in self.frames


class Evidence:
    """The engine's side. Each method speaks for the thread that calls it."""

    def __init__(self, descriptor: int | None = None) -> None:
        """`descriptor`: of the worker's memory, closed here; None: nobody reads it."""
        size = SLOTS * SLOT_BYTES
        self._memory = mmap.mmap(-1 if descriptor is None else descriptor, size)
        if descriptor is not None:
            os.close(descriptor)
        self._free = iter(range(0, size, SLOT_BYTES))
        self._lock = threading.Lock()
        self._mine = threading.local()
        self._frames = 0

    def idle(self) -> None:
        """The device has nothing to do."""
        self._write(_body(IDLE))

    @contextmanager
    def working(self, stage: str, attempts: Iterable[Attempt] = ()) -> Iterator[None]:
        """In this block the thread works for these attempts."""
        with self._during(_body(stage, attempts)):
            yield

    @contextmanager
    def taking(self) -> Iterator[None]:
        """In this block the thread takes the next frame off the pipe; one thread does so."""
        self._frames += 1
        with self._during(_body(TAKE, frame=self._frames)):
            yield

    @contextmanager
    def _during(self, body: bytes) -> Iterator[None]:
        self._write(body)
        try:
            yield
        finally:
            self._write(_REST)

    def _write(self, body: bytes) -> None:
        at, memory = self._slot(), self._memory
        (number,) = _NUMBER.unpack_from(memory, at)
        _NUMBER.pack_into(memory, at, number | 1)
        _BODY.pack_into(memory, at + _NUMBER.size, len(body), zlib.crc32(body))
        memory[at + _HEAD_BYTES : at + _HEAD_BYTES + len(body)] = body
        _NUMBER.pack_into(memory, at, (number | 1) + 1)

    def _slot(self) -> int:
        at: int | None = getattr(self._mine, "at", None)
        if at is None:
            with self._lock:
                at = self._mine.at = next(self._free)
        return at


def _body(stage: str, attempts: Iterable[Attempt] = (), frame: int = 0) -> bytes:
    body = json.dumps([stage, list(attempts), frame]).encode()
    return body if len(body) <= SLOT_BYTES - _HEAD_BYTES else _UNTOLD


class EvidenceMemory:
    """The worker's side: the memory, to be inherited by one engine."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("overpaint-evidence")
        os.ftruncate(self.descriptor, SLOTS * SLOT_BYTES)

    def read(self) -> AtWork | None:
        """What the engine was doing; None: what is there cannot be read.

        It is read, not mapped: an engine that cuts it short must not end its worker.
        """
        return at_work(os.pread(self.descriptor, SLOTS * SLOT_BYTES, 0))

    def close(self) -> None:
        """Let it go."""
        os.close(self.descriptor)


def at_work(memory: bytes) -> AtWork | None:
    """What the slots say together; None: one of them cannot be read."""
    if len(memory) != SLOTS * SLOT_BYTES:
        return None
    try:
        told = [_told(memory[at : at + SLOT_BYTES]) for at in range(0, len(memory), SLOT_BYTES)]
    except (ValueError, TypeError, RecursionError):
        return None
    busy = [each for each in told if each is not None]
    return AtWork(
        attempts=frozenset(attempt for _, attempts, _ in busy for attempt in attempts),
        frames=frozenset(frame for _, _, frame in busy if frame),
        rests=[stage for stage, _, _ in busy] == [IDLE],
    )


def _told(slot: bytes) -> tuple[str, list[Attempt], int] | None:
    """What one slot says; None: its thread was at nothing. Raises ValueError, TypeError for nonsense."""
    (number,) = _NUMBER.unpack_from(slot)
    length, crc = _BODY.unpack_from(slot, _NUMBER.size)
    if number % 2 or not length:
        return None
    body = slot[_HEAD_BYTES : _HEAD_BYTES + length]
    if len(body) != length or zlib.crc32(body) != crc:
        raise ValueError("the slot is damaged")
    stage, attempts, frame = json.loads(body)
    if not isinstance(stage, str) or type(frame) is not int:
        raise TypeError("a stage and a frame are wanted")
    return stage, [_attempt(*each) for each in attempts], frame


def _attempt(job: object, token: object) -> Attempt:
    if not isinstance(job, str) or type(token) is not int:
        raise TypeError("a job and a token are wanted")
    return job, token
