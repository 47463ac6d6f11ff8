"""Masks: float32 [H, W], 0..1, 1 = repaint. Sources, operations, combination, and checks.

A mask is first brought onto the canvas; all its operations then count the canvas's pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal

import numpy as np
import torch

from overpaint_shared.errors import MaskError
from overpaint_shared.job import (
    AlphaMask,
    Blur,
    ClipsegMask,
    CombinedMask,
    Feather,
    FeatherBorders,
    Grow,
    ImageMask,
    Invert,
    Mask,
    MaskOp,
    PadMask,
    Threshold,
)
from overpaint_shared.sizes import At

from . import morphology, resample, time_limit
from .canvas import Canvas
from .geometry import check_size
from .picture import Picture

How = Literal["union", "intersect", "subtract"]
Image = Callable[[str], torch.Tensor]
"""What the picture of an image mask holds [H, W], by the mask's path in the job: "mask", "mask.masks[1]"."""
Find = Callable[[ClipsegMask, str], torch.Tensor | None]
"""What a text names, as a mask [H, W] of the canvas's size; None: nothing. The second argument is the mask's
path in the job."""


class NothingToRepaint(Exception):
    """Nothing was found, and the job wants its source back then (`on_empty` = "skip")."""


def build(
    mask: Mask,
    source: Picture,
    canvas: Canvas,
    image: Image,
    find: Find | None = None,
    *,
    compat: bool = False,
    field: str = "mask",
) -> torch.Tensor:
    """Make the mask that a job describes, float32 [H, W] of the canvas's size, and check its coverage.

    Args:
        mask: the job's description.
        source: the picture before `prepare`.
        canvas: the picture after it.
        image: gives what the picture of an image mask holds.
        find: gives what CLIPSeg found, where there is any such mask.
        compat: the reference's defects.
        field: where the description stands in the job.

    Raises:
        MaskError: wrong size, no such transparency, no `pad` to take it from, nothing found for a text,
            coverage out of bounds, or nothing covered at all (which the reference lets pass).
        NothingToRepaint: nothing was found, which the job wants skipped.

    """
    made = _build(mask, _Making(source, canvas, image, find, compat), field)
    if made is None:
        raise NothingToRepaint
    if not compat and made.max() == 0:
        raise MaskError(
            "the mask covers nothing: not one pixel would be repainted",
            field=field,
            value="black everywhere",
            fix="white is what is repainted; the operation `invert` turns a mask round",
        )
    return made


@dataclass(frozen=True, eq=False)
class _Making:
    """What all parts of a mask are made from."""

    source: Picture
    canvas: Canvas
    image: Image
    find: Find | None
    compat: bool


def _build(mask: Mask, making: _Making, field: str) -> torch.Tensor | None:
    """None: nothing was found, and that is to be skipped, whatever the operations and the coverage."""
    time_limit.check(field)
    if isinstance(mask, CombinedMask):
        made = _combined(mask, making, field)
    elif isinstance(mask, ClipsegMask):
        made = _found(mask, making, field)
    else:
        made = apply(_plain(mask, making, field), mask.ops, compat=making.compat)
    if made is None:
        return None
    if isinstance(mask, CombinedMask):
        made = apply(made, mask.ops, compat=making.compat)
    check_coverage(made, mask.min_coverage, mask.max_coverage, field)
    return made


def _plain(mask: ImageMask | AlphaMask | PadMask, making: _Making, field: str) -> torch.Tensor:
    if isinstance(mask, ImageMask):
        return place(making.image(field), making.canvas, mask.at, f"{field}.image")
    if isinstance(mask, AlphaMask):
        alpha = from_alpha(making.source, compat=making.compat, field=field)
        return making.canvas.carry(alpha, field)
    return from_pad(making.canvas, field)


def _found(mask: ClipsegMask, making: _Making, field: str) -> torch.Tensor | None:
    """What the text names, its operations applied; where that is nothing, what `on_empty` says instead."""
    if making.find is None:
        raise ValueError("a mask from CLIPSeg needs `find`")
    found, size = making.find(mask, field), making.canvas.size
    if found is not None:
        check_size(found, "canvas", {"canvas": size}, field)
        return apply(found, mask.ops, compat=making.compat)
    if mask.on_empty == "skip":
        return None
    if mask.on_empty == "full":
        return torch.ones(size.height, size.width)
    if making.compat:  # the reference's empty mask, with which it goes on
        return apply(torch.zeros(size.height, size.width), mask.ops, compat=True)
    fix = 'use other words, lower `threshold`, or say what to do by `on_empty` ("skip" or "full")'
    raise MaskError(f"nothing was found for {mask.text!r}", field=f"{field}.text", value=mask.text, fix=fix)


def _combined(mask: CombinedMask, making: _Making, field: str) -> torch.Tensor | None:
    """Parts that are skipped are empty; None where they leave nothing.

    At most two parts are held at a time.
    """
    made: torch.Tensor | None = None
    nothing = False
    for index, each in enumerate(mask.masks):
        part = _build(each, making, f"{field}.masks[{index}]")
        if part is None:
            nothing |= mask.how == "intersect" or (mask.how == "subtract" and index == 0)
        elif not nothing:
            made = part if made is None else combine(mask.how, [made, part], field)
    return None if nothing else made


def place(mask: torch.Tensor, canvas: Canvas, at: At, field: str) -> torch.Tensor:
    """Bring a mask [H, W] onto the canvas; raises MaskError where its size is not the one that `at` says."""
    check_size(mask, at, {"source": canvas.geometry.source, "canvas": canvas.size}, field)
    return canvas.carry(mask, field) if at == "source" else mask


def from_alpha(source: Picture, *, compat: bool = False, field: str = "mask") -> torch.Tensor:
    """The source's transparency [H, W] of the source's size: transparent is repainted.

    A source without any is refused; under `compat` it is an empty mask.
    """
    if source.alpha is not None:
        return 1 - source.alpha
    if compat:
        return torch.zeros(source.height, source.width)
    fix = "give the mask as a picture of its own, or a source with transparency"
    raise MaskError("the source has no transparency", field=field, value="alpha", fix=fix)


def load_image_mask(source: Picture) -> torch.Tensor:
    """The second output of the reference's Load Image: 1 - alpha, or else 64 x 64 zeros of any size."""
    return torch.zeros(64, 64) if source.alpha is None else 1 - source.alpha


def from_pad(canvas: Canvas, field: str = "mask") -> torch.Tensor:
    """What `pad` added [H, W]; raises MaskError where nothing was."""
    if canvas.geometry.pads:
        return canvas.pad_mask
    fix = 'add {"op": "pad", ...} to `prepare`, or take the mask from elsewhere'
    raise MaskError("no `pad` in `prepare` extends the picture", field=field, value="pad", fix=fix)


def combine(how: How, masks: Sequence[torch.Tensor], field: str = "mask") -> torch.Tensor:
    """Union (largest value), intersection (smallest), or the first less all others, not below 0."""
    first, *others = masks
    if any(other.shape != first.shape for other in others):
        sizes = ", ".join(f"{mask.shape[1]} x {mask.shape[0]}" for mask in masks)
        raise MaskError(
            f"the masks differ in size: {sizes}", field=field, value=sizes, fix="give all of them one size"
        )
    return reduce(_COMBINE[how], others, first)


_COMBINE: dict[How, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "union": torch.maximum,
    "intersect": torch.minimum,
    "subtract": lambda mask, other: (mask - other).clamp(min=0),
}


def apply(mask: torch.Tensor, ops: Sequence[MaskOp], *, compat: bool = False) -> torch.Tensor:
    """Apply the operations of a job to a mask [H, W], in order."""
    return reduce(partial(_apply, compat=compat), ops, mask)


def _apply(mask: torch.Tensor, op: MaskOp, *, compat: bool) -> torch.Tensor:
    time_limit.check("mask")
    match op:
        case Grow():
            return grow(mask, op.by, tapered=op.tapered)
        case Feather():
            return feather(mask, op.by)
        case FeatherBorders():
            return feather_borders(mask, op.left, op.top, op.right, op.bottom, compat=compat)
        case Blur():
            return blur(mask, op.radius)
        case Invert():
            return invert(mask)
        case Threshold():
            return threshold(mask, op.at)


def grow(mask: torch.Tensor, by: int, *, tapered: bool = True) -> torch.Tensor:
    """Grow a mask [H, W] by so many pixels (the reference's GrowMask); a negative number shrinks it.

    Tapered growth is a diamond, else a square. Grey values stay grey.
    """
    change = morphology.dilate if by > 0 else morphology.erode
    return torch.from_numpy(change(mask.numpy(), abs(by), tapered=tapered))


def feather(mask: torch.Tensor, by: int) -> torch.Tensor:
    """Soften the mask's own edge [H, W] inward, linearly over so many pixels; 0 stays 0 and nothing grows."""
    return torch.from_numpy(morphology.soften_inward(mask.numpy(), by))


def feather_borders(
    mask: torch.Tensor, left: int, top: int, right: int, bottom: int, *, compat: bool = False
) -> torch.Tensor:
    """Weaken a mask [H, W] towards the picture's borders (the reference's FeatherMask).

    The i-th row or column from a border is multiplied by (i + 1) / width. Under `compat` the
    right and the bottom start one too early, as in the reference: the first column stands in for the last.
    """
    height, width = mask.shape
    out = mask * _ramp(width, left)
    out = out * _far_ramp(width, right, compat=compat)
    out = out * _ramp(height, top)[:, None]
    return out * _far_ramp(height, bottom, compat=compat)[:, None]


def _ramp(length: int, reach: int) -> torch.Tensor:
    reach = min(reach, length)
    factors = torch.ones(length)
    if reach:
        factors[:reach] = torch.from_numpy(((np.arange(reach) + 1.0) / reach).astype(np.float32))
    return factors


def _far_ramp(length: int, reach: int, *, compat: bool) -> torch.Tensor:
    mirrored = _ramp(length, reach).flip(0)
    return mirrored.roll(1) if compat else mirrored


def blur(mask: torch.Tensor, radius: float) -> torch.Tensor:
    """Gaussian blur of a mask [H, W], standard deviation `radius` pixels, reflected at the borders."""
    if radius == 0:
        return mask
    return torch.from_numpy(morphology.blur(mask.numpy(), radius)).clamp(0, 1)


def invert(mask: torch.Tensor) -> torch.Tensor:
    """Swap what is repainted and what is kept [H, W]."""
    return 1 - mask


def threshold(mask: torch.Tensor, at: float) -> torch.Tensor:
    """1 where a mask [H, W] is greater than `at`, else 0."""
    return (mask > at).float()


def coverage(mask: torch.Tensor) -> float:
    """The share of the picture that a mask [H, W] covers, 0..1: its mean."""
    return float(mask.numpy().mean(dtype=np.float64))


def check_coverage(mask: torch.Tensor, least: float, most: float, field: str = "mask") -> float:
    """Return the coverage of a mask [H, W]; raises MaskError where it is outside `least` .. `most`."""
    share = coverage(mask)
    name = "min_coverage" if share < least else "max_coverage" if share > most else None
    if name is None:
        return share
    bound = least if name == "min_coverage" else most
    fix = f"look at the mask with `overpaint prepare`, or change {field}.{name}"
    raise MaskError(
        f"the mask covers {share:.2%} of the canvas, {name} is {bound:.2%}",
        field=f"{field}.{name}",
        value=share,
        fix=fix,
    )


def check_survives(mask: torch.Tensor, latent_width: int, latent_height: int, field: str = "mask") -> None:
    """Refuse a mask [H, W] of which nothing is left at the latent's size: it would repaint nothing.

    Each latent cell sees the four pixels around its centre only, so a line of one pixel can fall between.
    An empty mask is not thin; `build` is for that.
    """
    seen = resample.resize_plane(mask, latent_width, latent_height)
    if mask.max() > 0 and seen.max() == 0:
        fix = "grow the mask by 4 pixels or more, or scale the picture up first"
        size = f"{latent_width} x {latent_height}"
        raise MaskError(
            f"the mask is so thin that nothing of it is left at {size}", field=field, value=size, fix=fix
        )
