"""What only-masked saves: one picture with a small mask, whole against only the masked part.

    .venv/bin/python bench/only_masked.py --shape sd15 --device cuda:0
    .venv/bin/python bench/only_masked.py --registry models.toml --model sd15 --device cuda:0
    .venv/bin/python bench/only_masked.py --shape tiny --side 256 --steps 2

Prints one JSON line: the medians in seconds, of the whole job and of its part on the device (CPU threads
decode and encode files while the device serves other jobs), their ratios, and whether everything outside the
mask stayed bit for bit. The mask is a disc that covers the wished share of the picture. Loading is not
counted: each way renders once before it is timed.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rendering import Engine, add_options, device_name, peak_mib, pictures, png, receipt, registry_of

ON_DEVICE = ("load", "condition", "encode", "denoise", "decode")
REGIONS = ("only_masked", "full")


def job(model: str, region: Mapping[str, Any], steps: int) -> dict[str, Any]:
    return {
        "version": 1, "model": model, "source": {"image": "s.png"}, "prompt": "a red hat",
        "mask": {"from": "image", "image": "m.png"}, "method": {"kind": "latent_noise_mask"},
        "sampling": {"seed": 1, "steps": steps, "sampler": "euler", "scheduler": "normal"}, "region": region,
    }  # fmt: skip


def rendered(
    engine: Engine, model: str, kind: str, wish: argparse.Namespace, inputs: Mapping[str, bytes]
) -> tuple[list[dict[str, float]], bytes]:
    """Seconds of each stage, for each time that the job was rendered but the first; the last picture."""
    region = {"kind": kind, **({"size": wish.size} if kind == "only_masked" else {})}
    spent = []
    for i in range(wish.repeat + 1):
        name = f"{kind}-{i}"
        came = engine.submit(name, job(model, region, wish.steps), inputs)
        (done,) = engine.until_done(name)
        stages = receipt(done)["seconds"]
        spent.append({
            **{stage: stages.get(stage, 0.0) for stage in ("prepare", *ON_DEVICE, "store")},
            "device": sum(stages.get(stage, 0.0) for stage in ON_DEVICE),
            "whole": engine.ends[name][0] - came,
        })  # fmt: skip
        print(name, spent[-1], file=sys.stderr)
    return spent[1:], done.files["image.png"]


def medians(spent: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {stage: round(statistics.median(each[stage] for each in spent), 4) for stage in spent[0]}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    parser.add_argument("--side", type=int, default=2048, help="pixels (2048)")
    parser.add_argument("--share", type=float, default=0.06, help="of the picture under the mask (0.06)")
    parser.add_argument("--size", type=int, default=None, help="to work at (the model's own)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    wish = options()
    source, mask = pictures(wish.side, wish.share)
    inputs = {"s.png": png(source), "m.png": png(mask)}
    seconds: dict[str, dict[str, float]] = {}
    peaks: dict[str, float | None] = {}
    identical = True
    with (
        registry_of(wish) as (registry, model),
        Engine(registry, wish.device, wish.threads, max(wish.side**2, 2**25)) as engine,
    ):
        for kind in REGIONS:
            peak_mib(wish.device, forget=True)
            spent, picture = rendered(engine, model, kind, wish, inputs)
            seconds[kind], peaks[kind] = medians(spent), peak_mib(wish.device)
            out = np.asarray(Image.open(io.BytesIO(picture)))
            identical = identical and bool(np.array_equal(out[mask == 0], source[mask == 0]))
    full, part = seconds["full"], seconds["only_masked"]
    found = {
        "bench": "only_masked", "side": wish.side, "coverage": round(float(mask.mean()) / 255, 4),
        "steps": wish.steps, "device": wish.device, "device_name": device_name(wish.device), "model": model,
        "seconds": seconds, "peak_mib": peaks, "ratio": round(part["whole"] / full["whole"], 4),
        "ratio_on_device": round(part["device"] / full["device"], 4), "outside_identical": identical,
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
