"""The repaint methods side by side on one picture, one mask and the same seeds: what each keeps and changes.

    .venv/bin/python bench/methods.py --out pictures
    .venv/bin/python bench/methods.py --help    # for pictures and models of your own

Each method is rendered with and without `composite`. Prints a table, then one JSON line; writes the pictures
and a sheet of those without `composite`, where a method shows what it is.

| figure | is |
|---|---|
| spread | inside the mask: standard deviation over the seeds, mean over pixels and channels, levels |
| change | inside the mask: mean absolute difference to the source, levels |
| outside | where the mask is 0: greatest and mean absolute difference to the source, levels |
| seam, ring | the certificate's `seam_contrast.result` and `ring.shift.delta_e`, mean over the seeds |
| found | in how many pictures the segmenter finds what was wanted, on a tenth of the mask at least |
| seconds | wall time of all jobs of that row, which share their passes, by their number |
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sheets
import structlog
from PIL import Image
from rendering import Engine, add_options, device_name, receipt

from overpaint_shared.job import parse_job
from overpaint_worker import protocol as p
from overpaint_worker.here import engine_options, prepared
from overpaint_worker.registry import SHIPPED

SCENES = Path(__file__).parents[1] / "tests" / "data" / "miniatures"
SHOWN = 4
"""Seeds on the sheet."""
FOUND = 0.1
"""Share of the mask."""
LARGEST = 2**25
"""Pixels of a canvas."""
Levels = np.ndarray


def ways(wish: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What differs from method to method, by a name for the table."""
    hole = {"from": "image", "image": "m.png", "ops": [{"op": "grow", "by": wish.grow, "tapered": False}]}
    controlled = {"kind": "controlnet_inpaint", "controlnet": wish.controlnet}
    words = {"from": "clipseg", "text": wish.word, "segmenter": wish.segmenter, "ops": hole["ops"]}
    return {
        "img2img": {"mask": hole, "method": {"kind": "img2img"}},
        "VAE encode for inpainting": {"mask": hole, "method": {"kind": "vae_encode_inpaint"}},
        "latent noise mask": {"mask": hole, "method": {"kind": "latent_noise_mask"}},
        "ControlNet inpaint": {"mask": hole, "method": controlled},
        "ControlNet inpaint, over latent noise": {
            "mask": hole, "method": {**controlled, "latent": "latent_noise_mask"},
        },
        "CLIPSeg, latent noise mask": {"mask": words, "method": {"kind": "latent_noise_mask"}},
        "inpainting model": {"mask": hole, "method": {"kind": "inpaint_model"}, "model": wish.inpaint_model},
    }  # fmt: skip


def job(wish: argparse.Namespace, way: Mapping[str, Any], seed: int, *, composite: bool) -> dict[str, Any]:
    """`compat` stays `none`, so that nothing but putting the original back differs."""
    return {
        "version": 1, "model": wish.model, "source": {"image": "s.png"}, "prompt": wish.prompt,
        "sampling": {"seed": seed}, "composite": composite, "compat": "none", **way,
    }  # fmt: skip


def levels(data: bytes) -> Levels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int16)


def grey(data: bytes) -> Levels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


def found(wish: argparse.Namespace, end: p.Done) -> bool:
    """Whether the segmenter sees what was wanted on enough of the job's mask."""
    words = {"from": "clipseg", "text": wish.wanted, "segmenter": wish.segmenter, "threshold": 0.5,
             "blur": 0.0, "dilation_factor": 0, "on_empty": "skip"}  # fmt: skip
    spec = parse_job(job(wish, {"mask": words, "method": {"kind": "latent_noise_mask"}}, 0, composite=True))
    picture = {"s.png": end.files["image.png"]}
    files, _ = prepared(spec, picture, engine_options(wish.registry, wish.device, wish.threads))
    return bool((grey(files["mask.png"]) > 0)[grey(end.files["mask.png"]) > 127].mean() >= FOUND)


def measured(source: Levels, ends: Sequence[p.Done]) -> dict[str, float]:
    """One row of the table, but for its time and what is found."""
    pictures = np.stack([levels(end.files["image.png"]) for end in ends])
    mask = grey(ends[0].files["mask.png"])
    told = [receipt(end)["certificate"] for end in ends]
    change = np.abs(pictures - source)
    return {
        "spread": float(pictures[:, mask > 127].std(axis=0).mean()),
        "change": float(change[:, mask > 127].mean()),
        "outside_largest": int(change[:, mask == 0].max()),
        "outside_mean": float(change[:, mask == 0].mean()),
        "seam": statistics.fmean(each["seam_contrast"]["result"] for each in told),
        "seam_before": told[0]["seam_contrast"]["original"],
        "ring": statistics.fmean(each["ring"]["shift"]["delta_e"] for each in told),
    }


def rendered(
    engine: Engine, jobs: Sequence[Mapping[str, Any]], inputs: Mapping[str, bytes]
) -> tuple[list[p.Done], float]:
    """All jobs at once, and the seconds of each."""
    began = time.perf_counter()
    names = [f"{time.monotonic_ns()}-{i}" for i in range(len(jobs))]
    for name, spec in zip(names, jobs, strict=True):
        engine.submit(name, spec, inputs)
    return engine.until_done(*names), (time.perf_counter() - began) / len(names)


def side_by_side(
    engine: Engine, wish: argparse.Namespace, inputs: Mapping[str, bytes]
) -> Iterator[tuple[dict[str, Any], list[p.Done]]]:
    """Each row of the table, with the jobs' ends that it was taken from."""
    source = levels(inputs["s.png"])
    for name, way in ways(wish).items():
        rendered(engine, [job(wish, way, 0, composite=True)], inputs)  # loads the models
        for composite in (False, True):
            jobs = [job(wish, way, seed, composite=composite) for seed in range(1, wish.seeds + 1)]
            ends, seconds = rendered(engine, jobs, inputs)
            row = {"method": name, "composite": composite, **measured(source, ends)}
            row |= {"found": sum(found(wish, end) for end in ends), "seconds": seconds}
            yield {key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}, ends


def keep(folder: Path, row: Mapping[str, Any], ends: Sequence[p.Done]) -> None:
    """Write a row's pictures, `METHOD-SEED.png`; those with the original put back end in `-composite`."""
    name = row["method"].replace(", ", "-").replace(" ", "-") + "-{}" + "-composite" * row["composite"]
    for seed, end in enumerate(ends, 1):
        (folder / f"{name.format(seed)}.png").write_bytes(end.files["image.png"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = [key for key in rows[0] if key != "seam_before"]
    lines = [heads, ["---"] * len(heads), *([str(row[key]) for key in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    parser.add_argument("--inpaint-model", default="mini-inpaint", help="with nine input channels")
    parser.add_argument("--controlnet", default="mini-inpaint")
    parser.add_argument("--segmenter", default="clipseg")
    parser.add_argument("--source", type=Path, default=SCENES / "1000010.png")
    parser.add_argument("--mask", type=Path, default=SCENES / "1000010-lion.png", help="white: repaint")
    parser.add_argument("--grow", type=int, default=10, help="pixels that the mask grows first (10)")
    parser.add_argument("--word", default="lion", help="what CLIPSeg is to find")
    parser.add_argument("--prompt", default="a dog on a red background")
    parser.add_argument("--wanted", default="dog", help="what is to be found in the results")
    parser.add_argument("--seeds", type=int, default=8, help="the seeds 1 to so many (8)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.set_defaults(registry=SHIPPED, model="mini")
    return parser.parse_args()


def main() -> None:
    wish = options()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    wish.out.mkdir(parents=True, exist_ok=True)
    inputs = {"s.png": wish.source.read_bytes(), "m.png": wish.mask.read_bytes()}
    rows, shown = [], {}
    with Engine(wish.registry, wish.device, wish.threads, LARGEST) as engine:
        for row, ends in side_by_side(engine, wish, inputs):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            keep(wish.out, row, ends)
            if not row["composite"]:
                shown[row["method"].replace(", ", ",\n")] = [end.files["image.png"] for end in ends[:SHOWN]]
                hole = ends[0].files["mask.png"]
    sheets.write(wish.out / "methods.png", {"source, mask": [inputs["s.png"], hole], **shown})
    print(table(rows))
    print(json.dumps({
        "bench": "methods", "seeds": wish.seeds, "device": device_name(wish.device),
        "source": wish.source.name, "mask": wish.mask.name, "prompt": wish.prompt, "rows": rows,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
