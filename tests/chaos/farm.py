"""The farm that is hurt: the shipped servers, and workers under a supervisor that starts again what ended.

It does what systemd does with `Restart=on-failure`, but sooner. Every life of a worker has its own log and
journal.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from overpaint_shared.settings import Settings
from tests import fake_engine
from tests.chaos.plan import MODELS, REAL_MODEL
from tests.compose import new_passwords
from tests.shipped import MINIATURES, Shipped, ShippedFarm, ShippedRedis, ShippedS3
from tests.workers import WorkerProcess

RESTART_S: Final = 0.5
"""The unit says RestartSec=5."""
STEP_BUDGET_S: Final = 2.0
"""How long the fake engine lets a step take, and a decoder."""
HUNG_EXIT_S: Final = 80.0
"""Beyond the unit's TimeoutStopSec."""


@dataclass
class Life:
    """A worker's process from its start to its end."""

    process: WorkerProcess
    slot: "Slot"
    began: float
    ended: float | None = None
    code: int | None = None
    hurt: str | None = None
    """The fault that is to end it; None: nobody asked it to end."""
    held: bool = False
    """It is frozen."""

    @property
    def pid(self) -> int:
        """Its Celery process, which leads its group."""
        return self.process.popen.pid

    @property
    def unasked(self) -> bool:
        """Whether it ended by itself."""
        return self.code is not None and self.hurt is None

    def signal(self, number: signal.Signals) -> None:
        """Send to all of its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@dataclass
class Slot:
    """A place where one worker runs, like one device of a host."""

    number: int
    models: tuple[str, ...]
    real: bool = False
    lives: list[Life] = field(default_factory=list)
    due: float = 0.0
    """When it is to be started again, monotonic."""

    @property
    def life(self) -> Life | None:
        """Who runs there now."""
        return self.lives[-1] if self.lives and self.lives[-1].code is None else None

    @property
    def open(self) -> bool:
        """Whether a worker takes jobs there, and no other fault is on it."""
        life = self.life
        return (
            life is not None
            and life.hurt is None
            and not life.held
            and bool(life.process.said("worker.open"))
        )


class Workers:
    """The supervisor. One thread starts all workers: the kernel ends a child with the thread that made it."""

    def __init__(self, farm: ShippedFarm, slots: Sequence[Slot]) -> None:
        self.farm = farm
        self.slots = slots
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor")

    @property
    def lives(self) -> list[Life]:
        """All that ever were."""
        return [life for slot in self.slots for life in slot.lives]

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """SIGTERM to all, as a host that goes down, and wait for their ends."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(0.05):
            for slot in self.slots:
                self._look_after(slot)
        self._stop()

    def _stop(self) -> None:
        left = [life for life in self.lives if life.code is None]
        for life in left:
            life.hurt = life.hurt or "end"
            life.signal(signal.SIGCONT)
            with suppress(ProcessLookupError):
                os.kill(life.pid, signal.SIGTERM)
        for life in left:
            with suppress(subprocess.TimeoutExpired):
                life.code = life.process.popen.wait(HUNG_EXIT_S)

    def _look_after(self, slot: Slot) -> None:
        life = slot.life
        if life is not None:
            life.code = life.process.popen.poll()
            if life.code is not None:
                life.ended, slot.due = time.time(), time.monotonic() + RESTART_S
        elif time.monotonic() >= slot.due:
            slot.lives.append(self._launch(slot))

    def _launch(self, slot: Slot) -> Life:
        options: dict[str, Any] = {"name": f"slot{slot.number}", "switch_after_s": 2}
        environment = {fake_engine.BUDGET_S: str(STEP_BUDGET_S)}
        registry = MINIATURES if slot.real else None
        if not slot.real:
            options |= {"stage_s": STEP_BUDGET_S, "answer_s": 2 * STEP_BUDGET_S}
        process = self.farm.start(slot.models, registry, environment, **options)
        return Life(process, slot, time.time())


@dataclass
class Hurt:
    """Servers, workers and producers of one campaign."""

    folder: Path
    lease: dict[str, float]
    real: int = 0
    servers: Shipped | None = None
    """Those of its own, where none are given."""

    def __post_init__(self) -> None:
        self.on = self.servers or _own_servers(self.folder)

    def start(self) -> None:
        """Start all, and wait until every worker takes jobs."""
        for server in (self.on.redis, self.on.s3):
            server.start()
        self.farm = self.on.farm(self.folder, **self.lease)
        self.workers = Workers(self.farm, slots(self.real))
        self.workers.start()

    def settings(self, owner: str) -> Settings:
        """A producer's."""
        return self.on.settings("producer", owner=owner, **self.lease)

    def end(self) -> None:
        """No process is left."""
        if hasattr(self, "workers"):
            self.workers.stop()
            self.farm.end()
        for server in (self.on.redis, self.on.s3):
            server.end()

    def orphans(self) -> list[str]:
        """Processes that name this campaign's folder, and are neither of its servers."""
        servers = {server.child.process.pid for server in (self.on.redis, self.on.s3) if server.child}
        return [
            words
            for pid, words in _processes()
            if str(self.folder) in words and pid not in servers | {os.getpid()}
        ]


def _own_servers(folder: Path) -> Shipped:
    passwords = new_passwords()
    return Shipped(ShippedRedis(folder / "redis", passwords), ShippedS3(folder / "s3", passwords))


def slots(real: int) -> list[Slot]:
    """Each model on three workers of four, so that no fault leaves one without."""
    served = [MODELS[:1], MODELS, MODELS[1:], MODELS]
    fake = [Slot(number, models) for number, models in enumerate(served)]
    return fake + [Slot(len(fake) + number, (REAL_MODEL,), real=True) for number in range(real)]


def children_of(pid: int) -> list[int]:
    """The processes that a process started, and that have not ended."""
    found: list[int] = []
    with suppress(OSError):
        for place in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (place / "children").read_text().split())
    return found


def _processes() -> Iterable[tuple[int, str]]:
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with suppress(OSError):
                words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if words:
                    yield int(place.name), words
