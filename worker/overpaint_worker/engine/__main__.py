"""The engine process: `python -m overpaint_worker.engine --fd N --registry models.toml ...`.

Three kinds of threads: the main one is the device's and runs the conductor; a reader takes messages off the
pipe; a writer puts them on, so that the device never waits for a full pipe. The worker decides when it ends:
signals that a terminal or service manager sends to the whole group are ignored, and the end of the pipe ends
the process at once. If it hangs and cannot read, the kernel ends it with its worker.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final

import structlog

from overpaint_shared.errors import OverpaintError
from overpaint_worker import protocol as p
from overpaint_worker.engine.options import EngineOptions, parse
from overpaint_worker.evidence import Evidence
from overpaint_worker.logs import configure
from overpaint_worker.parent import end_with_parent

if TYPE_CHECKING:
    from overpaint_worker.engine.conductor import Conductor
    from overpaint_worker.engine.families.weights import HashCache

EXIT_BROKEN_DEVICE: Final = 3
EXIT_BROKEN_PIPE: Final = 4
FLUSH_S: Final = 5.0

log = structlog.get_logger(__name__)


class Outbox:
    """Messages to the worker, written by a thread of their own in the order they came."""

    def __init__(self, pipe: Connection, evidence: Evidence) -> None:
        self._pipe, self._evidence = pipe, evidence
        self._queue: queue.SimpleQueue[p.ToWorker | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._thread.start()

    def put(self, message: p.ToWorker) -> None:
        """Queue a message; never blocks."""
        self._queue.put(message)

    def flush(self, within_s: float) -> None:
        """Write what is queued, then take no more."""
        self._queue.put(None)
        self._thread.join(within_s)

    def _write(self) -> None:
        while (message := self._queue.get()) is not None:
            if isinstance(message, p.Done):  # its pictures may take much memory
                with self._evidence.working("send", [(message.job, message.token)]):
                    self._send(message)
            else:
                self._send(message)

    def _send(self, message: p.ToWorker) -> None:
        try:
            self._pipe.send_bytes(self._encoded(message))
        except OSError:
            os._exit(0)  # the worker is gone

    @staticmethod
    def _encoded(message: p.ToWorker) -> bytes:
        try:
            return p.encode(message)
        except (p.ProtocolError, ValueError) as error:
            if not isinstance(message, p.Done):
                raise
            told = p.ProtocolError(f"the result cannot be sent: {error}").to_json()
            return p.encode(p.Failed(job=message.job, token=message.token, error=told, kind="job"))


class Mailbox:
    """What the worker says, kept until there is a conductor to take it."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._lock = threading.Lock()
        self._early: list[p.Render | p.Cancel | p.Load] = []
        self._conductor: Conductor | None = None

    def put(self, message: p.Render | p.Cancel | p.Load) -> None:
        """Hand a message in, now or later."""
        with self._lock:
            if self._conductor is None:
                self._early.append(message)
            else:
                _hand_in(message, self._conductor)

    def open(self, conductor: Conductor) -> None:
        """Hand in what came, and from now on all."""
        with self._lock:
            self._conductor = conductor
            for message in self._early:
                _hand_in(message, conductor)


def _hand_in(message: p.Render | p.Cancel | p.Load, conductor: Conductor) -> None:
    match message:
        case p.Render():
            conductor.submit(message)
        case p.Cancel(job=job, token=token):
            conductor.cancel(job, token)
        case p.Load(model=model):
            conductor.load(model)


def read_forever(pipe: Connection, mailbox: Mailbox, evidence: Evidence) -> None:
    """Take what the worker says; leave with the pipe's end, whatever the device is doing."""
    while True:
        try:
            pipe.poll(None)
            with evidence.taking():
                _take(p.decode(pipe.recv_bytes(p.MAX_FRAME_BYTES)), mailbox)
        except (EOFError, OSError):
            os._exit(0)
        except p.ProtocolError as error:
            log.error("not a message", action="protocol_error", error=str(error))  # noqa: TRY400
            os._exit(EXIT_BROKEN_PIPE)


def _take(message: p.Message, mailbox: Mailbox) -> None:
    match message:
        case p.Render() | p.Cancel() | p.Load():
            mailbox.put(message)
        case p.Begin():
            mailbox.begun.set()
        case p.Stop():
            os._exit(0)
        case _:
            raise p.ProtocolError(f"a {type(message).__name__} message is for the worker")


def wait_as_spare(options: EngineOptions, outbox: Outbox, mailbox: Mailbox) -> HashCache | None:
    """Do all that needs no device, then wait for `Begin`; the digests that were computed."""
    from overpaint_worker.engine.warming import Warming

    warming = Warming(options)
    warming.run()
    outbox.put(p.Warm(pid=os.getpid()))
    mailbox.begun.wait()
    warming.over()
    return warming.hashes


def serve(options: EngineOptions) -> int:
    """Bring the device up, say so, and render until the pipe ends. Returns an exit status."""
    pipe, evidence = Connection(options.fd), Evidence(options.evidence)
    outbox, mailbox = Outbox(pipe, evidence), Mailbox()
    # From the start on, for an import takes seconds, and a spare waits for hours.
    threading.Thread(
        target=read_forever, args=(pipe, mailbox, evidence), name="engine-reader", daemon=True
    ).start()
    hashes = wait_as_spare(options, outbox, mailbox) if options.spare else None
    from overpaint_worker.engine.assemble import build, ready  # torch is imported here

    conductor = build(options, outbox.put, hashes, evidence)
    outbox.put(ready(conductor, options))
    mailbox.open(conductor)
    try:
        conductor.run()
    except Exception as error:
        log.critical("the device is broken", action="device_broken", error=str(error), exc_info=True)
        outbox.flush(FLUSH_S)
        return EXIT_BROKEN_DEVICE
    return 0


def main() -> None:
    """The process's whole life."""
    end_with_parent(signal.SIGKILL)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_IGN)
    options = parse()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read once, when torch is imported
        os.environ[name] = str(options.threads)
    configure(as_json=options.json_logs)
    try:
        status = serve(options)
    except OverpaintError as error:  # a wrong registry, no such device
        log.critical(str(error), action="engine_refused")
        status = error.exit_code
    sys.stderr.flush()
    os._exit(status)  # threads may hang in a driver; nothing is left to save


if __name__ == "__main__":
    main()
