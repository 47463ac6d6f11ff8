"""What one worker is asked to be: parsed from the command line once, then passed on as a value."""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from overpaint_shared.errors import SettingsError
from overpaint_worker.control import RemoteControl
from overpaint_worker.cycle import SWITCH_AFTER_S

ALL_DEVICES = "all"
CPU = "cpu"
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_FARMS_OWN = ("OVERPAINT_", "AWS_", "REDIS")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_SLOTS = 256
MAX_PORT = 65_535


def _default_engine() -> tuple[str, ...]:
    return (sys.executable, "-m", "overpaint_worker.engine")


def _check_variable(name: str) -> None:
    if not _VARIABLE.fullmatch(name):
        raise SettingsError(
            f"{name!r} is no name of a variable", field="--engine-env", value=name, fix="write NAME,NAME"
        )
    if name.startswith(_FARMS_OWN):
        raise SettingsError(
            f"{name} is a setting of the farm, which the engine must not have",
            field="--engine-env",
            value=name,
            fix="leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """One worker on one device."""

    device: str
    """`cpu`, or `cuda:N` counted among the devices that the worker's environment shows."""
    models: tuple[str, ...]
    """The models whose queues it reads."""
    registry: Path
    slots: int = 6
    """At most so many jobs are held at once: the engine's batch limit and two to keep it fed."""
    grace_s: float = 60.0
    """Seconds to finish what runs after SIGTERM."""
    switch_after_s: float = SWITCH_AFTER_S
    name: str | None = None
    json_logs: bool = False
    threads: int = 1
    """CPU threads of the engine's arithmetic."""
    warm: tuple[str, ...] = ()
    """The models that are loaded before it takes jobs."""
    remote_control: RemoteControl = "inspect"
    """Which of Celery's remote commands it obeys: questions alone, or all."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    """Where metrics are served; 0: a free port; None: nowhere."""
    hashes: Path | None = None
    """Where the engine remembers the digests of weights, which take minutes to compute."""
    engine: tuple[str, ...] = field(default_factory=_default_engine)
    """The engine's program. Tests put another here."""
    spare: bool = True
    """Keep a second engine process warm, which takes the place of one that dies."""
    engine_env: tuple[str, ...] = ()
    """Variables that the engine gets beside those that every engine needs."""
    answer_s: float = 60.0
    """Seconds without a word after which an engine that has jobs is taken for hung."""

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise SettingsError(
                f"unknown device {self.device!r}", field="--device", fix="write cpu, cuda:0 (1, 2 ...) or all"
            )
        if not self.models:
            raise SettingsError("no model is named", field="--models", fix="write --models NAME,NAME")
        if cold := set(self.warm) - set(self.models):
            raise SettingsError(
                f"{min(cold)!r} is not among --models",
                field="--warm",
                value=min(cold),
                fix=f"name some of: {', '.join(self.models)}",
            )
        if self.metrics_port is not None and not 0 <= self.metrics_port <= MAX_PORT:
            raise SettingsError(f"port {self.metrics_port}", field="--metrics-port", fix="write 0 to 65535")
        if not 1 <= self.slots <= MAX_SLOTS:
            raise SettingsError(f"{self.slots} slots", field="--slots", fix=f"write 1 to {MAX_SLOTS}")
        if not 0 <= self.grace_s < float("inf"):
            raise SettingsError(f"{self.grace_s} seconds", field="--grace", fix="write 0 or more seconds")
        for variable in self.engine_env:
            _check_variable(variable)
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise SettingsError(
                f"{self.name!r} is no name", field="--name", fix="letters, digits and . _ - only"
            )

    @property
    def index(self) -> int | None:
        """The device's number; None for the CPU."""
        return None if self.device == CPU else int(self.device.partition(":")[2] or 0)

    def visible_devices(self, environment: Mapping[str, str] = os.environ) -> str:
        """`CUDA_VISIBLE_DEVICES` for the engine: this device alone, counted among those visible to the
        worker.
        """
        if self.index is None:
            return ""
        shown = [d.strip() for d in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
        if not shown:
            return str(self.index)
        if self.index >= len(shown):
            raise SettingsError(
                f"{self.device} is not among CUDA_VISIBLE_DEVICES={','.join(shown)}",
                field="--device",
                fix=f"write cuda:0 to cuda:{len(shown) - 1}",
            )
        return shown[self.index]
