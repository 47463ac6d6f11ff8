"""Child processes of a local farm: started under guard, logged to files, stopped in order, never orphaned."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from overpaint_producer.private_files import open_private_log, private_folder, shorten_private_log
from overpaint_shared.errors import ServiceError
from overpaint_shared.restart import STEADY_S, Restart

GUARD = Path(__file__).with_name("guard.py")
POLL_S = 0.02
GIVE_UP_AFTER = 5
"""Ends of one child in a row, each within a minute of its start."""
_LONGEST_LINE = 4096  # of a log that is searched for complaints; a job's text may stand in it
_FAULT = re.compile(r"\[(?:warning|error|critical) *\] (?P<event>.*?) +action=(?P<rest>.*)")
_REASON = re.compile(r"""\berror=(?P<quote>['"])(?P<text>.*?)(?P=quote)(?: \w+=|$)""")


@dataclass(frozen=True, kw_only=True)
class Child:
    """A running program, its output in the file `log`.

    It leads a session of its own, so that a terminal's Ctrl-C reaches only `overpaint up`, which then stops
    its children one after the other.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    began: int = 0
    """Where in the log its own lines begin, bytes: the file goes on from run to run."""

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def stop(self, timeout_s: float = 15.0) -> int:
        """End it with SIGTERM, then what is left of its group with SIGKILL. Returns its exit status."""
        if self.alive:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        return self.kill()

    def kill(self) -> int:
        """SIGKILL its whole process group at once, as a power cut would. Returns the exit status."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def tail(self, lines: int = 15) -> str:
        """The last `lines` lines of its log."""
        return "\n".join(self._lines()[-lines:])

    def faults(self) -> list[str]:
        """What its log complains of, each thing once, without times and keys; of a worker's console log."""
        found = [_FAULT.search(line[:_LONGEST_LINE]) for line in self._lines()]
        told = [_REASON.search(each["rest"]) or each for each in found if each]
        return list(dict.fromkeys(each.groupdict().get("text") or each["event"] for each in told))

    def said(self) -> str:
        """Its complaints; the tail of its log where it has none."""
        return "\n".join(f"  {fault}" for fault in self.faults()) or self.tail()

    def _lines(self) -> list[str]:
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            # A log that became too long while it ran begins anew.
            log.seek(self.began if self.began <= os.fstat(log.fileno()).st_size else 0)
            return log.read().decode(errors="replace").splitlines()
        return []


@dataclass
class Kept:
    """A child that is started again when it ends by itself. All calls come from one thread that lives."""

    child: Child
    again: Callable[[], Child]
    """Starts it anew; may raise ServiceError, OSError and ValueError."""
    clock: Callable[[], float] = time.monotonic
    _restart: Restart = field(default_factory=Restart)
    _began: float = 0.0
    _due: float | None = None

    def __post_init__(self) -> None:
        self._began = self.clock()

    def step(self) -> str | None:
        """Look after it; what is to be told, if anything. ServiceError when it ends again and again."""
        with contextlib.suppress(OSError):  # a full disk: the log stays as it is
            shorten_private_log(self.child.log)
        if self._due is None:
            return None if self.child.alive else self._ended(f"status {self.child.process.returncode}")
        if self.clock() < self._due:
            return None
        self._due = None
        self._began = self.clock()
        try:
            self.child = self.again()
        except (ServiceError, OSError, ValueError) as error:  # a full disk, no more processes, damaged keys
            return self._ended(str(getattr(error, "message", error)).partition("\n")[0])
        return f"{self.child.name} was started again"

    def _ended(self, how: str) -> str:
        pause_s = self._restart.pause_s(self.clock() - self._began)
        if self._restart.failures > GIVE_UP_AFTER:
            raise ServiceError(
                f"{self.child.name} ended by itself {self._restart.failures} times, each within "
                f"{STEADY_S:g} s of its start, last with {how}. Its log ends:\n{self.child.tail()}",
                fix=f"read {self.child.log}",
            )
        self._due = self.clock() + pause_s
        return f"{self.child.name} ended by itself ({how}); it is started again in {pause_s:g} s"


def guarded(argv: Sequence[str], last: signal.Signals = signal.SIGKILL) -> list[str]:
    """The command that runs `argv` and ends with this process, however that ends: it is sent `last` then.

    To be started from a thread that lives: the kernel watches the *thread* that did it. SIGKILL is the one
    signal that also ends what is stopped, hangs, or waits for a service that has gone before it.
    """
    return [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), str(int(last)), *argv]


def start(
    name: str,
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    last: signal.Signals = signal.SIGKILL,
) -> Child:
    """Start `argv`, `guarded`, in a session of its own.

    `env` is added to this process's environment. Only this user can read `log` and what `argv` writes. A
    program that is not there shows in `wait_ready`.
    """
    private_folder(log.parent)
    with os.fdopen(open_private_log(log), "ab") as out:
        began = out.tell()
        process = subprocess.Popen(
            guarded(argv, last),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            umask=0o077,
            start_new_session=True,
        )
    return Child(name=name, process=process, log=log, began=began)


def wait_ready(child: Child, answers: Callable[[], bool], *, timeout_s: float) -> None:
    """Wait until `answers()` is true. Raises ServiceError if the child ends or time runs out."""
    deadline = time.monotonic() + timeout_s
    while child.alive:
        if answers():
            return
        if time.monotonic() > deadline:
            child.stop()
            raise ServiceError(
                f"{child.name} did not answer within {timeout_s:g} s.\n{child.said()}",
                fix=f"read {child.log}",
            )
        time.sleep(POLL_S)
    raise ServiceError(
        f"{child.name} ended at its start, status {child.process.returncode}.\n{child.said()}",
        fix=f"read {child.log}",
    )
