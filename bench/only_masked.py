"""What only-masked saves: one picture with a small mask, whole against only the masked part.

    .venv/bin/python bench/only_masked.py --registry models.toml --model sd15 --device cuda:0
    .venv/bin/python bench/only_masked.py --registry models.toml --model tiny --side 256 --steps 2

Prints one JSON line: the two medians in seconds, their ratio, and whether everything outside the mask stayed
bit for bit. The mask is a disc that covers the wished share of the picture. Loading is not counted: each way
renders once before it is timed.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from overpaint_shared.settings import Limits
from overpaint_worker import protocol as p
from overpaint_worker.engine.assemble import build
from overpaint_worker.engine.conductor import Conductor
from overpaint_worker.engine.options import EngineOptions


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


def render(conductor: Conductor, ends: list[p.ToWorker], name: str, spec: Any, inputs: Any) -> p.Done:
    conductor.submit(p.Render(job=name, token=1, spec_json=json.dumps(spec), inputs=inputs))
    conductor.run_until_idle()
    end = ends.pop()
    if not isinstance(end, p.Done):
        raise SystemExit(f"{name}: {end}")
    return end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--registry", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", type=int, default=2048, help="pixels (2048)")
    parser.add_argument("--share", type=float, default=0.06, help="of the picture under the mask (0.06)")
    parser.add_argument("--size", type=int, default=None, help="to work at (the model's own)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    wish = parser.parse_args()

    ends: list[p.ToWorker] = []

    def heard(message: p.ToWorker) -> None:
        if isinstance(message, p.Done | p.Failed):
            ends.append(message)

    options = EngineOptions(
        fd=-1, registry=wish.registry, device=wish.device, threads=wish.threads,
        limits=Limits(max_output_pixels=max(wish.side**2, 2**25)),
    )  # fmt: skip
    conductor = build(options, heard)
    source, mask = pictures(wish.side, wish.share)
    inputs = {"s.png": png(source), "m.png": png(mask)}
    spec = {
        "version": 1, "model": wish.model, "source": {"image": "s.png"}, "prompt": "a red hat",
        "mask": {"from": "image", "image": "m.png"}, "method": {"kind": "latent_noise_mask"},
        "sampling": {"seed": 1, "steps": wish.steps, "sampler": "euler", "scheduler": "normal"},
    }  # fmt: skip
    regions = {"full": {"kind": "full"}, "only_masked": {"kind": "only_masked", "size": wish.size}}
    seconds: dict[str, float] = {}
    identical = True
    for name, region in regions.items():
        taken = []
        for _ in range(wish.repeat + 1):
            began = time.perf_counter()
            done = render(conductor, ends, name, {**spec, "region": region}, inputs)
            taken.append(time.perf_counter() - began)
        seconds[name] = round(statistics.median(taken[1:]), 4)
        out = np.asarray(Image.open(io.BytesIO(done.files["image.png"])))
        identical = identical and bool(np.array_equal(out[mask == 0], source[mask == 0]))
    conductor.close()
    print(
        json.dumps(
            {
                "side": wish.side, "coverage": round(float(mask.mean()) / 255, 4), "steps": wish.steps,
                "device": wish.device, "model": wish.model, "seconds": seconds,
                "ratio": round(seconds["only_masked"] / seconds["full"], 4), "outside_identical": identical,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
