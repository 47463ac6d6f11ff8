"""Kills an engine while it is at what a test wants it to be at, and not in the moment between two units."""

import os
import signal
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from overpaint_worker.evidence import SLOT_BYTES, SLOTS, AtWork, at_work
from tests.waiting import wait_until

NAME = "memfd:overpaint-evidence"


def evidence_of(engine: int) -> AtWork | None:
    """What a process is at, read as its worker, its parent, reads it."""
    maps = Path(f"/proc/{engine}/maps").read_text().splitlines()
    inode = next(int(line.split()[4]) for line in maps if NAME in line)
    parent = _status(engine, "PPid")
    for descriptor in Path(f"/proc/{parent}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if NAME in str(descriptor.readlink()) and descriptor.stat().st_ino == inode:
                with descriptor.open("rb") as file:
                    return at_work(file.read(SLOTS * SLOT_BYTES))
    raise AssertionError("the engine has no evidence")


def kill_at(engine: int, jobs: Collection[str]) -> None:
    """Kill it while it is at these jobs and no others."""
    wait_until(lambda: _stopped_at(engine, set(jobs)), what=f"the engine at {jobs}")
    os.kill(engine, signal.SIGKILL)


def _stopped_at(engine: int, jobs: set[str]) -> bool:
    os.kill(engine, signal.SIGSTOP)
    wait_until(lambda: _status(engine, "State").startswith("T"))
    found = evidence_of(engine)
    if found is not None and {job for job, _ in found.attempts} == jobs and not found.frames:
        return True
    os.kill(engine, signal.SIGCONT)
    return False


def _status(process: int, name: str) -> str:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:"))
