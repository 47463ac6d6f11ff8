"""Scenes that the miniatures were not trained on, jobs on them, and what the segmenter sees in a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from overpaint_shared.job import parse_job
from overpaint_shared.settings import Limits
from overpaint_worker import protocol as p
from overpaint_worker.engine.clipseg.findings import search
from overpaint_worker.engine.preparation import open_pictures
from overpaint_worker.registry import SHIPPED
from tests.rendering import house, render, request

SCENES = Path(__file__).parent / "data" / "miniatures"
Where = NDArray[np.bool_]
"""[256, 256]."""


@dataclass(frozen=True)
class Scene:
    """A picture of `deploy.miniatures.fixture`."""

    number: str
    ground: str
    words: tuple[str, ...]

    @property
    def picture(self) -> bytes:
        return (SCENES / f"{self.number}.png").read_bytes()

    def mask(self, word: str) -> bytes:
        """Where the object shows, as a picture."""
        return (SCENES / f"{self.number}-{word}.png").read_bytes()

    def caption(self, *words: str) -> str:
        """What would be said of it if it showed these things."""
        return f"{' and '.join(article(word) for word in words)} on a {self.ground} background"


def article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def scenes() -> list[Scene]:
    """All of them."""
    told = json.loads((SCENES / "scenes.json").read_text())
    return [Scene(number, each["ground"], tuple(each["words"])) for number, each in told.items()]


def scene(number: int) -> Scene:
    """The scene of that number."""
    (found,) = [each for each in scenes() if each.number == str(number)]
    return found


def hole(grow: int = 10) -> dict[str, Any]:
    """The mask picture `m.png`, grown so that the old thing's shadow is under it too."""
    return {"from": "image", "image": "m.png", "ops": [{"op": "grow", "by": grow, "tapered": False}]}


def rendered(jobs: Mapping[str, tuple[Scene, str, Mapping[str, Any]]]) -> dict[str, p.Done]:
    """Render jobs of the shipped registry together.

    Each is a scene, the object whose place is masked (`m.png`), and what its spec has besides the usual.
    """
    usual = {"version": 1, "model": "mini", "source": {"image": "s.png"}}
    requests = [
        request(name, {**usual, **spec}, {"s.png": each.picture, "m.png": each.mask(word)})
        for name, (each, word, spec) in jobs.items()
    ]
    ends = render(SHIPPED, requests)
    assert {name: end for name, end in ends.items() if not isinstance(end, p.Done)} == {}
    return ends


def levels(picture: bytes) -> NDArray[np.float64]:
    """An encoded picture as [256, 256, 3], 0..255."""
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(np.float64)


def where(mask: bytes) -> Where:
    """An encoded mask picture: where it is more than half."""
    return np.asarray(Image.open(io.BytesIO(mask)).convert("L")) > 127


def seen(picture: bytes, word: str) -> Where:
    """Where the shipped segmenter is rather sure of a word than not, by the engine's own preparation."""
    words = {
        "from": "clipseg", "text": word, "threshold": 0.5, "blur": 0.0,
        "dilation_factor": 0, "on_empty": "skip",
    }  # fmt: skip
    spec = parse_job({
        "version": 1, "model": "mini", "source": {"image": "s.png"}, "mask": words,
        "method": {"kind": "latent_noise_mask"},
    })  # fmt: skip
    opened = open_pictures(spec, {"s.png": picture}, Limits())
    with torch.inference_mode():
        *_, found = search(spec, opened.canvas.rgb, house(SHIPPED).segmenters)
    map_ = found.mask("mask", 256, 256)
    return np.zeros((256, 256), dtype=bool) if map_ is None else (map_ > 0).numpy()
