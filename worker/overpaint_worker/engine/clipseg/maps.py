"""From CLIPSeg's logits to a mask and a heat map, as the reference's node makes them, level for level.

The logits become probabilities, lose what is not above the threshold, are blurred, stretched to 0..1 and
dilated, all at the model's own size. Then they are coloured by a table of 256 entries and scaled to the
picture. The grey table is not a straight line, so the mask is soft in its own way; it is the reference's.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from overpaint_shared.errors import PrecisionError

from .. import morphology

Plane = NDArray[np.float32]
Levels = NDArray[np.uint8]

TABLES: Final = Path(__file__).with_name("colour-maps.json")
"""The maps `Greys_r` and `viridis` as matplotlib draws them, cut off to 8 bits, in hexadecimal."""

WEIGHT_BITS: Final = 11
"""OpenCV's fixed point: a weight of 1 is 2 to this power."""


@cache
def tables() -> tuple[Levels, Levels]:
    """Grey [256] and viridis [256, 3]."""
    read = {name: bytes.fromhex(text) for name, text in json.loads(TABLES.read_text()).items()}
    grey = np.frombuffer(read["greys_r"], np.uint8)
    return grey, np.frombuffer(read["viridis"], np.uint8).reshape(256, 3)


def indices(logits: torch.Tensor, *, threshold: float, blur: float, dilation: int) -> Levels | None:
    """Where in the colour tables each cell of the model's map [h, w] is; None where nothing was found.

    Args:
        logits: float [h, w].
        threshold: probabilities up to this are nothing.
        blur: standard deviation, cells of the map; the border is reflected.
        dilation: cells by which a square grows on each side; nothing comes in over the border.

    Raises:
        PrecisionError: the logits are no numbers.

    """
    if not bool(torch.isfinite(logits).all()):
        raise PrecisionError(
            "the segmenter's answer is not made of numbers", field="mask", value="nan",
            fix="name another segmenter; the weights of this one are damaged",
        )  # fmt: skip
    likely = torch.sigmoid(logits.to("cpu", torch.float32)).numpy()
    likely = np.where(likely > np.float32(threshold), likely, np.float32(0))
    if blur > 0:
        likely = ndimage.gaussian_filter(likely, sigma=blur)
    low, high = likely.min(), likely.max()
    if low == high:  # the reference divides 0 by 0 here, and paints what comes of it black
        return None
    stretched: Plane = (likely - low) / (high - low)
    grown = morphology.dilate(stretched, dilation, tapered=False)
    levels: Levels = np.minimum(grown * np.float32(256), np.float32(255)).astype(np.uint8)
    return levels


def mask(found: Levels | None, width: int, height: int) -> torch.Tensor:
    """The mask [height, width], 0..1, of what `indices` gave; zeros of nothing."""
    if found is None:
        return torch.zeros(height, width)
    grey, _ = tables()
    return torch.from_numpy(resize(grey[found], width, height).astype(np.float32) / np.float32(255))


def heat_map(found: Levels | None, picture: torch.Tensor) -> torch.Tensor:
    """Half the picture [H, W, 3] and half the map in false colours, 0..1, in whole 8-bit levels."""
    height, width = picture.shape[:2]
    _, viridis = tables()
    colours = viridis[found] if found is not None else np.zeros((1, 1, 3), np.uint8)
    coloured = np.stack([resize(plane, width, height) for plane in np.moveaxis(colours, -1, 0)], axis=-1)
    mixed = np.rint((eight_bits(picture).astype(np.float32) + coloured) / 2)
    return torch.from_numpy(mixed.astype(np.float32) / np.float32(255))


def eight_bits(picture: torch.Tensor) -> Levels:
    """A picture of any shape, 0..1, in 8-bit levels, cut off, not rounded: what the segmenter is shown."""
    return np.clip(picture.cpu().numpy() * np.float32(255), 0, 255).astype(np.uint8)


def resize(levels: Levels, width: int, height: int) -> Levels:
    """Scale [h, w] bilinearly to [height, width], to the bit as OpenCV's INTER_LINEAR does with 8 bits.

    Weights are whole 2048ths, rounded half to even; columns first, then rows, where four bits of the sum are
    dropped before it is weighed and sixteen after, and the last two are rounded.
    """
    left, right, near, far = _weights(levels.shape[1], width)
    across = levels[:, left].astype(np.int32) * near + levels[:, right].astype(np.int32) * far
    above, below, near, far = _weights(levels.shape[0], height)
    shifted = across >> 4
    upper = (shifted[above] * near[:, None]) >> 16
    lower = (shifted[below] * far[:, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _weights(
    length: int, wanted: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.int32], NDArray[np.int32]]:
    """For each wanted cell the two it lies between, and their weights; the border's cells are repeated."""
    centre = ((np.arange(wanted) + 0.5) * (1 / (wanted / length)) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.intp)
    share = centre - first.astype(np.float32)
    one = np.float32(1 << WEIGHT_BITS)
    near, far = (np.rint(part * one).astype(np.int32) for part in (np.float32(1) - share, share))
    return np.clip(first, 0, length - 1), np.clip(first + 1, 0, length - 1), near, far
