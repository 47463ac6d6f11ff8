"""How soon a job makes steps again after its engine was killed: with a spare engine, and without.

    OMP_NUM_THREADS=1 python bench/engine_death.py [--kills 10] [--busy N] [--json]

On embedded Redis and S3, one worker on the CPU with the shipped miniatures. Each kill has a job of its own,
which makes steps when SIGKILL ends the engine. The time ends when the ledger shows the next attempt's first
step; a worker tells the ledger twice a second, so up to half a second of each time is that. `--busy` runs so
many other processes that keep a core each busy. The baseline is the same worker with `--no-spare`, in the
same run.

With the spare, each kill waits until the spare is warm, as it is on a farm whose engine does not die every
few seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from overhead import environment, picture, services

from overpaint_producer.client import Farm
from overpaint_shared.ledger import JobRecord, JobState
from overpaint_shared.settings import Settings

TARGET_S = 5.0
PATIENCE_S = 180.0
SPIN = "while True: pass"


class Worker:
    """A worker with the real engine, and its log."""

    def __init__(self, settings: Settings, log: Path, spare: Sequence[str]) -> None:
        self.log = log
        options = ["--device", "cpu", "--models", "mini", "--grace", "0", "--json-logs", *spare]
        with log.open("wb") as out:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "overpaint_worker.main", *options],
                env=environment(settings), stdout=out, stderr=out,
            )  # fmt: skip

    def said(self, action: str) -> list[dict[str, Any]]:
        """The log lines of an action."""
        found = []
        for line in self.log.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return [line for line in found if line.get("action") == action]

    @property
    def engine(self) -> int:
        """The engine that is up."""
        return int(self.said("engine.ready")[-1]["engine_pid"])

    def end(self) -> None:
        """SIGTERM, and wait."""
        self.popen.terminate()
        self.popen.wait(60)


@contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes that keep a core each busy."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(processes)]
    try:
        yield
    finally:
        for each in spinning:
            each.kill()
            each.wait()


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.02)


def spec(sha256: str, seed: int) -> dict[str, Any]:
    return {
        "version": 1, "model": "mini", "source": {"image": f"sha256:{sha256}"}, "method": {"kind": "img2img"},
        "prompt": "a red hat",
        "sampling": {"seed": seed, "steps": 1000, "cfg": 7.0, "sampler": "euler", "scheduler": "normal",
                     "denoise": 1.0},
    }  # fmt: skip


def kill(farm: Farm, worker: Worker, sha256: str, seed: int, spare: bool) -> float:
    """Seconds from the engine's death to its job's next step."""

    def record() -> JobRecord:
        found = farm.ledger.job(job.id)
        assert found is not None
        return found

    def steps(attempt: int) -> bool:
        now = record()
        return now.state is JobState.RUNNING and now.attempt == attempt and now.step > 0

    if spare:
        until(lambda: len(worker.said("engine.spare_ready")) == seed + 1, "a warm spare")
    job = farm.submit(spec(sha256, seed))
    until(lambda: steps(1), "the first step")
    began = time.monotonic()
    os.kill(worker.engine, signal.SIGKILL)
    until(lambda: steps(2), "the next attempt's first step")
    took = time.monotonic() - began
    job.cancel()
    until(lambda: record().state not in (JobState.RUNNING, JobState.CANCELLING), "its end")
    return took


def measured(settings: Settings, folder: Path, kills: int, options: Sequence[str]) -> list[float]:
    """The times of one worker."""
    worker = Worker(settings, folder / "worker.log", options)
    farm = Farm(settings)
    try:
        until(lambda: bool(worker.said("worker.open")), "the worker's start")
        farm.store.ensure_bucket()
        sha256 = farm.store.put_input(settings.owner, picture())
        return [kill(farm, worker, sha256, n, "--spare" in options) for n in range(kills)]
    except AssertionError:
        print(worker.log.read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        worker.end()
        farm.close()


def row(name: str, times: Sequence[float]) -> str:
    p95 = sorted(times)[max(0, round(0.95 * len(times)) - 1)]
    return f"{name:12} {statistics.median(times):7.2f} {p95:7.2f} {max(times):7.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--busy", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true")
    wish = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, services(Path(name)) as settings, load(wish.busy):
        for option in ("--no-spare", "--spare"):
            folder = Path(name) / option
            folder.mkdir()
            found[option] = measured(settings, folder, wish.kills, [option])
    if wish.json:
        print(json.dumps({"seconds": found, "target_s": TARGET_S, "busy": wish.busy}))
        return
    print(
        f"{'':12} {'p50 s':>7} {'p95 s':>7} {'max s':>7}   of {wish.kills} kills, {wish.busy} busy processes"
    )
    for option, times in found.items():
        print(row(option, times))
    ratio = statistics.median(found["--no-spare"]) / statistics.median(found["--spare"])
    print(f"without a spare it takes {ratio:.1f} times as long; target: p50 under {TARGET_S:g} s")


if __name__ == "__main__":
    main()
