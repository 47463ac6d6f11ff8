"""An engine on a thread of its own, as in a worker, and pictures to give it: what the GPU's benches share."""

from __future__ import annotations

import argparse
import io
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import weights
from PIL import Image

from overpaint_shared.settings import Limits
from overpaint_worker import protocol as p
from overpaint_worker.engine.assemble import build
from overpaint_worker.engine.options import EngineOptions

LONGEST_S = 600.0


def png(levels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def pictures(side: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture with some grain [S, S, 3], and a disc [S, S] of that share of it."""
    y, x = np.mgrid[:side, :side] / side
    smooth = np.stack([x, y, (np.sin(9 * x) * np.cos(7 * y) + 1) / 2], axis=-1)
    grain = np.random.default_rng(0).normal(0, 0.02, smooth.shape)
    distance = np.hypot(x - 0.55, y - 0.45)
    disc = (distance < np.sqrt(share / np.pi)).astype(np.uint8) * 255
    return (np.clip(smooth + grain, 0, 1) * 255).astype(np.uint8), disc


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which weights, and where."""
    parser.add_argument("--shape", choices=weights.SHAPES, help="of random weights, made for this run")
    parser.add_argument("--registry", type=Path, help="weights of your own, instead")
    parser.add_argument("--model", help="which of them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)


@contextmanager
def registry_of(wish: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """The `models.toml` and the model's name that the command line asks for."""
    if wish.registry is not None and wish.model is not None:
        yield wish.registry, wish.model
    elif wish.shape is not None:
        with weights.registry(wish.shape, wish.device) as path:
            yield path, wish.shape
    else:
        raise SystemExit("name random weights with --shape, or your own with --registry and --model")


class Engine:
    """Takes jobs on any thread; remembers when each step was told and how each job ended."""

    def __init__(self, registry: Path, device: str, threads: int, most_pixels: int) -> None:
        self.steps: dict[str, list[float]] = {}
        """When a job's steps were told: that it joined first, then each step that was said."""
        self.ends: dict[str, tuple[float, p.ToWorker]] = {}
        self._news = threading.Condition()
        limits = Limits(max_output_pixels=most_pixels)
        options = EngineOptions(fd=-1, registry=registry, device=device, threads=threads, limits=limits)
        self._conductor = build(options, self._heard)
        self._thread = threading.Thread(target=self._conductor.run, name="device")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._conductor.stop()
        self._thread.join()

    def _heard(self, message: p.ToWorker) -> None:
        now = time.perf_counter()
        with self._news:
            if isinstance(message, p.Progress) and message.stage == "denoise":
                self.steps.setdefault(message.job, []).append(now)
            elif isinstance(message, p.Done | p.Failed):
                self.ends[message.job] = (now, message)
            self._news.notify_all()

    def submit(self, job: str, spec: Mapping[str, Any], inputs: Mapping[str, bytes]) -> float:
        """Hand a job in; the time."""
        self._conductor.submit(p.Render(job=job, token=1, spec_json=json.dumps(spec), inputs=dict(inputs)))
        return time.perf_counter()

    def until_stepping(self, *jobs: str) -> None:
        """Wait until all of them step."""
        self._until(lambda: all(job in self.steps for job in jobs))

    def until_done(self, *jobs: str) -> list[p.Done]:
        """Wait for the jobs' ends. Leaves the program with what went wrong with one."""
        self._until(lambda: all(job in self.ends for job in jobs))
        found = [self.ends[job][1] for job in jobs]
        return [end if isinstance(end, p.Done) else self._give_up(end) for end in found]

    def _until(self, true: Any) -> None:
        latest = time.monotonic() + LONGEST_S
        with self._news:
            while not true():
                if not self._thread.is_alive() or time.monotonic() > latest:
                    raise SystemExit("the engine's thread ended, or it took too long")
                self._news.wait(1.0)

    @staticmethod
    def _give_up(end: p.ToWorker) -> p.Done:
        raise SystemExit(str(end))


def receipt(done: p.Done) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(done.files["receipt.json"])
    return told


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def peak_mib(device: str, *, forget: bool = False) -> float | None:
    """The most memory that tensors held since it was last forgotten; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    if forget:
        torch.cuda.reset_peak_memory_stats(device)
    return round(torch.cuda.max_memory_allocated(device) / 2**20)
