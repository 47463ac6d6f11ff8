"""The engine process's command line, parsed before torch is imported. No torch here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from overpaint_shared.settings import Limits
from overpaint_worker.evidence import SLOTS

MOST_CPU_THREADS = SLOTS - 8
"""Each has a slot in the evidence; so have the threads for the device and the pipe."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine process runs."""

    fd: int
    """Descriptor of the socket to the worker."""
    registry: Path
    """`models.toml`."""
    evidence: int | None = None
    """Descriptor of the worker's memory for evidence."""
    device: str = "cpu"
    """`cpu`, or `cuda:N` among those that CUDA_VISIBLE_DEVICES leaves."""
    threads: int = 1
    """torch's threads within one operation. On two busy cores, two were five times slower than one."""
    cpu_threads: int = 2
    """Threads that decode and encode picture files."""
    max_rows: int = 16
    """Rows that no pass exceeds."""
    kept_models: int = 2
    """Models that stay loaded."""
    hashes: Path | None = None
    """File that remembers the digests of weights."""
    limits: Limits = field(default_factory=Limits)
    json_logs: bool = False
    spare: bool = False
    """Do all that needs no device, then wait until the worker says `Begin`."""

    def argv(self) -> list[str]:
        """These options as a command line, without `--fd` and `--evidence`, which the spawner appends."""
        given = [
            "--registry", str(self.registry), "--device", self.device, "--threads", str(self.threads),
            "--cpu-threads", str(self.cpu_threads), "--max-rows", str(self.max_rows),
            "--kept-models", str(self.kept_models), "--limits", _limits_json(self.limits),
        ]  # fmt: skip
        if self.hashes is not None:
            given += ["--hashes", str(self.hashes)]
        return given + (["--json-logs"] if self.json_logs else []) + (["--spare"] if self.spare else [])


def parse(argv: Sequence[str] | None = None) -> EngineOptions:
    """Options from the command line. Leaves the process with a usage message if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m overpaint_worker.engine",
        description="The engine process of a worker; started by overpaint-worker, not by hand.",
    )
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the socket to the worker")
    parser.add_argument("--evidence", type=int, help="descriptor of the memory for evidence")
    parser.add_argument("--registry", type=Path, required=True, help="models.toml")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=_positive, default=1, help="torch's threads in one operation (1)")
    parser.add_argument("--cpu-threads", type=_cpu_threads, default=2, help="threads for picture files (2)")
    parser.add_argument("--max-rows", type=_positive, default=16, help="rows that no pass exceeds (16)")
    parser.add_argument("--kept-models", type=_positive, default=2, help="models that stay loaded (2)")
    parser.add_argument("--hashes", type=Path, help="file that remembers the digests of weights")
    parser.add_argument("--limits", type=_limits, default=Limits(), help="the operator's limits, as JSON")
    parser.add_argument("--json-logs", action="store_true", help="log JSON lines")
    parser.add_argument("--spare", action="store_true", help="wait for `Begin` before opening the device")
    return EngineOptions(**vars(parser.parse_args(argv)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _cpu_threads(text: str) -> int:
    value = _positive(text)
    if value > MOST_CPU_THREADS:
        raise ValueError(text)
    return value


def _limits(text: str) -> Limits:
    given = json.loads(text)
    return Limits(**{f.name: given[f.name] for f in fields(Limits) if f.name in given})


def _limits_json(limits: Limits) -> str:
    return json.dumps({f.name: getattr(limits, f.name) for f in fields(Limits)})
