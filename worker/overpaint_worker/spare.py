"""A second engine process, kept warm up to the point where it would open the device.

When the engine dies, the spare takes its place at once, and the next spare is started in the background. A
spare that ends by itself counts against nobody: it had neither a job nor the device.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import structlog

from overpaint_worker.engine_process import EngineProcess, Launch, status_in_words
from overpaint_worker.free_memory import free_memory
from overpaint_worker.protocol import Begin, ProtocolError, Warm, encode

MIB = 2**20
STARTS_ABOVE = 1536 * MIB
ENDS_BELOW = 512 * MIB
"""Bytes of free memory. A warm spare holds about 500 MiB of its own; while it starts, a little more."""
WARM_START_S = 60.0
"""For a warm spare to open the device: it has imported and hashed all that takes long."""
LOOK_S = 5.0
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0

log = structlog.get_logger(__name__)


class Spare:
    """The spare of one engine. `tend` is called by one thread, `take` and `close` by any."""

    def __init__(self, launch: Launch) -> None:
        self._launch = replace(launch, argv=[*launch.argv, "--spare"])
        self._lock = threading.Lock()
        self._process: EngineProcess | None = None
        self._warm = False
        self._closed = False
        self._failures = 0
        self._not_before = 0.0
        self._looked_at = 0.0

    def tend(self, *, wanted: bool) -> None:
        """Start a spare when one is wanted and there is memory for it; notice what became of it."""
        now = time.monotonic()
        with self._lock:
            if self._closed:
                return
            if self._process is None:
                if wanted and now >= self._not_before:
                    self._start(now)
            elif (why := self._fault(self._process, now)) is not None:
                self._give_up(why, now)

    def take(self) -> EngineProcess | None:
        """The spare, told to become the engine; None if there is none that is warm."""
        with self._lock:
            process, warm = self._process, self._warm
            self._process, self._warm = None, False
        if process is None:
            return None
        if not warm or process.popen.poll() is not None or process.stopped:
            process.reap()  # half started at a low priority, it would be slower than a new one
            return None
        process.watch.started_at = time.monotonic()
        process.watch.start_s = min(process.watch.start_s, WARM_START_S)
        process.send(encode(Begin()))
        return process

    def close(self) -> None:
        """End the spare; there will be no other."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            process.reap()

    def _start(self, now: float) -> None:
        self._not_before = now + LOOK_S
        if free_memory() < STARTS_ABOVE:
            return
        try:
            self._process = EngineProcess(self._launch)
        except OSError as error:
            self._pause(f"it cannot be started: {error}", now)
            return
        log.debug("spare engine started", action="engine.spare_started", engine_pid=self._process.popen.pid)

    def _fault(self, process: EngineProcess, now: float) -> str | None:
        """Why the spare is of no use; None if all is well."""
        if (status := process.popen.poll()) is not None:
            return f"it ended, {status_in_words(status)}"
        if process.stopped:
            return "it is stopped"
        if not self._warm:
            return self._listen(process, now)
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            return "memory is short" if free_memory() < ENDS_BELOW else None
        return None

    def _listen(self, process: EngineProcess, now: float) -> str | None:
        try:
            if process.waits_to_be_read():
                message = process.read()
                if not isinstance(message, Warm):
                    self._closed = True
                    return f"its program knows no spare: it said {type(message).__name__}"
                self._warm, self._failures = True, 0
                log.info(
                    "spare engine ready", action="engine.spare_ready", engine_pid=process.popen.pid,
                    seconds=round(now - process.watch.started_at, 3),
                )  # fmt: skip
                return None
        except (EOFError, OSError, ProtocolError) as error:
            return f"it ended: {error!r}"
        hung = process.watch.hang(now)
        return f"it hung: {hung}" if hung else None

    def _give_up(self, why: str, now: float) -> None:
        process, self._process, self._warm = self._process, None, False
        if process is not None:
            process.reap()
        self._pause(why, now)

    def _pause(self, why: str, now: float) -> None:
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**self._failures)
        self._failures += 1
        self._not_before = now + pause_s
        log.warning("spare engine ended", action="engine.spare_ended", why=why, next_in_s=pause_s)
