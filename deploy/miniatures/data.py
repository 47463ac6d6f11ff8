"""The scenes that the models learn from, drawn once by all processors and kept as arrays on the device."""

from __future__ import annotations

import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploy.miniatures import world

CHUNK = 64  # scenes that a process draws before it reports


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Scenes 0 to N - 1."""

    pixels: Tensor
    """uint8 [N, 256, 256, 3]."""
    labels: Tensor
    """uint8 [N, 256, 256]: 0 where the ground shows, else 1 + the place in `words` of what does."""
    captions: list[str]
    words: list[list[str]]
    grounds: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def pictures(self, chosen: Tensor) -> Tensor:
        """Those of the numbers `chosen` [B]: float [B, 3, 256, 256] in -1..1."""
        return signed(self.pixels[chosen])


def load(out: Path, count: int, device: torch.device) -> Scenes:
    """The first `count` scenes, drawn into `out` where they are not there yet."""
    folder = out / f"scenes-{count}"
    if not (folder / "told.json").exists():
        _draw_all(folder, count)
    told = json.loads((folder / "told.json").read_text())
    arrays = [torch.from_numpy(np.load(folder / f"{name}.npy")).to(device) for name in ("pixels", "labels")]
    return Scenes(pixels=arrays[0], labels=arrays[1], **told)


def signed(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1..1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn(number: int) -> tuple[world.Pixels, world.Pixels, tuple[str, list[str], str]]:
    """(pixels, labels, (caption, words, ground)) of one scene."""
    scene = world.scene(number)
    label = np.zeros((world.SIZE, world.SIZE), np.uint8)
    for place, mask in enumerate(scene.masks.values()):
        label[mask > 127] = place + 1
    return scene.pixels, label, (scene.caption, list(scene.masks), scene.ground)


def _draw_all(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = world.SIZE
    pixels: NDArray[Any] = np.lib.format.open_memmap(
        folder / "pixels.npy", "w+", np.uint8, (count, size, size, 3)
    )
    labels: NDArray[Any] = np.lib.format.open_memmap(
        folder / "labels.npy", "w+", np.uint8, (count, size, size)
    )
    told: list[tuple[str, list[str], str]] = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(_draw_part, _parts(count))
        for at, (picture, label, said) in enumerate(itertools.chain.from_iterable(parts)):
            pixels[at], labels[at] = picture, label
            told.append(said)
    captions, words, grounds = zip(*told, strict=True)
    (folder / "told.json").write_text(json.dumps({"captions": captions, "words": words, "grounds": grounds}))


def _parts(count: int) -> list[range]:
    return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def _draw_part(numbers: range) -> list[Any]:
    return [drawn(number) for number in numbers]
