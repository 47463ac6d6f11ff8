"""Pictures of what goes wrong with each repaint method, and of what mends it, as docs/methods.md shows them.

    .venv/bin/python bench/mistakes.py --out docs/images

Writes `methods-mistakes.png` and `methods-words.png`, rendered by the shipped miniatures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sheets
import structlog
from rendering import Engine

from overpaint_worker.registry import SHIPPED

SCENES = Path(__file__).parents[1] / "tests" / "data" / "miniatures"
GREY, NOISE = {"kind": "vae_encode_inpaint"}, {"kind": "latent_noise_mask"}
NET = {"kind": "controlnet_inpaint", "controlnet": "mini-inpaint"}
LION = ("1000010", "lion", "a dog on a red background")
PIG = ("1000025", "pig", "a crown on a pink background")
Job = tuple[tuple[str, str, str], dict[str, Any]]


def job(place: tuple[str, str, str], method: dict[str, Any], *ops: dict[str, Any], **sampling: Any) -> Job:
    """The thing of a scene repainted; the mask grows by ten pixels if no operations are given."""
    mask = {"from": "image", "image": "m.png", "ops": list(ops) or [grow(10)]}
    return place, {"mask": mask, "method": method, "sampling": {"seed": 2, **sampling}, "composite": False}


def grow(by: int) -> dict[str, Any]:
    return {"op": "grow", "by": by, "tapered": False}


def put_back(one: Job) -> Job:
    """With the original put back outside the mask, softly where the mask is soft."""
    return one[0], {**one[1], "composite": True}


HARD, SOFT = (grow(10),), (grow(20), {"op": "feather", "by": 20})
MISTAKES: dict[str, list[Job]] = {
    "VAE encode, denoise\n1, 0.5, 0.3: grey shows": [job(LION, GREY, denoise=d) for d in (1.0, 0.5, 0.3)],
    "latent noise mask, denoise\n0.15, 0.3, 0.8: the old stays": [
        job(LION, NOISE, denoise=d) for d in (0.15, 0.3, 0.8)
    ],
    "the thing removed:\nVAE encode, noise mask,\nControlNet": [job(PIG, m) for m in (GREY, NOISE, NET)],
    "mask: not grown,\ngrown by 10, by 24": [job(LION, NOISE, grow(by)) for by in (0, 10, 24)],
    "grow_mask_by\n0, 6, 24": [job(LION, {**GREY, "grow_mask_by": by}) for by in (0, 6, 24)],
    "original put back:\nmask hard, mask soft": [put_back(job(LION, GREY, *ops)) for ops in (HARD, SOFT)],
}  # fmt: skip


PIZZA = ("1000016", "pizza", "a cat and a ball on a yellow background")
FIRM = ({"op": "threshold", "at": 0.4}, grow(10))


def words(place: tuple[str, str, str], *ops: dict[str, Any]) -> Job:
    """A job whose mask words find: the thing of a scene."""
    mask = {"from": "clipseg", "text": f"the {place[1]}", "ops": list(ops)}
    return place, {"mask": mask, "method": NOISE, "sampling": {"seed": 2}, "composite": True}


WORDS = {
    '"the lion",\nas it is found': words(LION),
    '"the lion",\nmade hard, and grown': words(LION, *FIRM),
    '"the pizza",\nmade hard, and grown': words(PIZZA, *FIRM),
}


def rendered(engine: Engine, jobs: Mapping[str, Job]) -> dict[str, dict[str, bytes]]:
    """Each job's files."""
    for name, ((number, word, prompt), spec) in jobs.items():
        usual = {
            "version": 1,
            "model": "mini",
            "source": {"image": "s.png"},
            "prompt": prompt,
            "compat": "none",
        }
        pictures = {"s.png": f"{number}.png", "m.png": f"{number}-{word}.png"}
        engine.submit(
            name, {**usual, **spec}, {k: (SCENES / file).read_bytes() for k, file in pictures.items()}
        )
    return {name: dict(end.files) for name, end in zip(jobs, engine.until_done(*jobs), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    named = {f"{label}{i}": each for label, row in MISTAKES.items() for i, each in enumerate(row)}
    with Engine(SHIPPED, "cpu", 1, 2**25) as engine:
        files = rendered(engine, {**named, **WORDS})
    rows = {
        label: [files[f"{label}{i}"]["image.png"] for i in range(len(row))] for label, row in MISTAKES.items()
    }
    sheets.write(out / "methods-mistakes.png", rows)
    shown = ("heatmap.png", "mask.png", "image.png")
    found = {
        label: [(SCENES / f"{place[0]}.png").read_bytes(), *(files[label][name] for name in shown)]
        for label, (place, _) in WORDS.items()
    }
    sheets.write(out / "methods-words.png", found, ("source", "heat map", "mask", "result"))


if __name__ == "__main__":
    main()
