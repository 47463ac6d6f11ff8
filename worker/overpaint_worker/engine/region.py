"""Only masked: the rectangle around the mask, the size it is worked on at, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from overpaint_shared.errors import InputError, MaskError
from overpaint_shared.job import OnlyMasked

from . import resample
from .geometry import Box, Size
from .sizing import MULTIPLE

NO_MODELS_SIZE = 512  # where a spec was not resolved by its model's defaults
FLOAT_DEPTH = 16  # resampling in float: the work is no file of 8 bits


@dataclass(frozen=True)
class Region:
    """A rectangle of the canvas and the size at which it is repainted."""

    box: Box
    work: Size

    def cut(self, canvas: torch.Tensor) -> torch.Tensor:
        """The rectangle of a picture [H, W, C] at the working size, smoothed where that is smaller."""
        return resample.resize(self._inside(canvas).contiguous(), *self.work, "lanczos", depth=FLOAT_DEPTH)

    def cut_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """The rectangle of a mask [H, W] at the working size, bilinearly, smoothed where that is smaller."""
        inside = self._inside(mask)[None, None]
        size = (self.work.height, self.work.width)
        return functional.interpolate(inside, size=size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)

    def stitch(self, work: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        """The canvas [H, W, C] with the repainted rectangle, scaled back, in its place."""
        x, y, width, height = self.box
        out = canvas.clone()
        out[y : y + height, x : x + width] = resample.resize(
            work.contiguous(), width, height, "lanczos", depth=FLOAT_DEPTH
        )
        return out

    def _inside(self, canvas: torch.Tensor) -> torch.Tensor:
        x, y, width, height = self.box
        return canvas[y : y + height, x : x + width]


def around(mask: torch.Tensor, wish: OnlyMasked, max_pixels: int, field: str = "region") -> Region:
    """Where to work for a mask [H, W].

    The rectangle holds all that is greater than the threshold, and `padding` pixels more on each side as far
    as the canvas goes. Its longer side is worked on at the wish's size, and the aspect is kept. Where a
    side is then no multiple of 8 the rectangle takes in a little more of the canvas, if there is more.

    Raises:
        MaskError: the mask is nowhere greater than the threshold.
        InputError: the working size is beyond the operator's limit.

    """
    canvas = Size(mask.shape[1], mask.shape[0])
    tight = _bounds(mask, wish, field)
    padded = _padded(tight, wish.padding, canvas)
    size = wish.size or NO_MODELS_SIZE
    scale = size / max(padded.width, padded.height)
    x, width, work_width = _side(padded.x, padded.width, canvas.width, scale)
    y, height, work_height = _side(padded.y, padded.height, canvas.height, scale)
    box, work = Box(x, y, width, height), Size(work_width, work_height)
    if work.width * work.height > max_pixels:
        fix = f"use a smaller size; this farm renders up to {max_pixels} pixels"
        raise InputError(
            f"the region would be worked on at {work}", field=f"{field}.size", value=size, fix=fix
        )
    return Region(box, work)


def _bounds(mask: torch.Tensor, wish: OnlyMasked, field: str) -> Box:
    """The smallest box of all that is greater than the threshold."""
    counts = (mask > wish.threshold).numpy()
    rows, columns = (np.flatnonzero(counts.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise MaskError(
            "the mask is nowhere greater than the region's threshold",
            field=f"{field}.threshold", value=wish.threshold, fix=f"use less than {float(mask.max()):.3g}",
        )  # fmt: skip
    x, y = int(columns[0]), int(rows[0])
    return Box(x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y)


def _padded(box: Box, padding: int, canvas: Size) -> Box:
    x, y = max(box.x - padding, 0), max(box.y - padding, 0)
    right = min(box.x + box.width + padding, canvas.width)
    bottom = min(box.y + box.height + padding, canvas.height)
    return Box(x, y, right - x, bottom - y)


def _side(start: int, length: int, room: int, scale: float) -> tuple[int, int, int]:
    """A side's start and length, grown evenly to a multiple of 8 at the working size, and that size.

    Where the canvas ends before, the working size is no multiple of 8, and its edges will be repeated.
    """
    whole = -(-round(length * scale, 6) // MULTIPLE) * MULTIPLE
    wanted = max(round(whole / scale), length)
    longer = min(wanted, room)
    moved = start - (longer - length) // 2
    work = int(whole) if longer == wanted else round(longer * scale)
    return min(max(moved, 0), room - longer), longer, max(work, 1)
