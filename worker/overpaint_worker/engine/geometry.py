"""Where a picture's pixels go on the way to the canvas: sizes and boxes as values, with no picture in them.

A geometry is planned from sizes alone, so that what is too large or out of bounds is refused before anything
is allocated. It then carries pictures, alpha channels and masks through the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch

from overpaint_shared.errors import InputError, MaskError
from overpaint_shared.job import Crop, Pad, PrepareOp, Scale, ScaleBy
from overpaint_shared.sizes import MISFIT_FIX, At, misfit

from . import resample, time_limit
from .deep_png import Samples
from .resample import Filter

GREY = 0.5  # what the reference paints where a picture is extended
MAX_SIDE = 65_535


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


class Box(NamedTuple):
    """A part of a picture: its upper left corner and its size, in pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class CropStep:
    """Keep what is inside a box."""

    box: Box

    @property
    def size(self) -> Size:
        """The size after this step."""
        return Size(self.box.width, self.box.height)

    def picture(self, rgb: torch.Tensor, depth: int) -> torch.Tensor:  # noqa: ARG002 - as every step
        """[H, W, C] to [h, w, C]."""
        return self.plane(rgb)

    def plane(self, plane: torch.Tensor) -> torch.Tensor:
        """[H, W] to [h, w]."""
        x, y, width, height = self.box
        return plane[y : y + height, x : x + width].contiguous()

    def samples(self, samples: Samples, grey: Samples) -> Samples | None:  # noqa: ARG002 - as every step
        """The file's own values [H, W, 3], cropped alike."""
        x, y, width, height = self.box
        return samples[y : y + height, x : x + width]

    def added(self) -> torch.Tensor | None:
        """Nothing is added."""
        return None


@dataclass(frozen=True)
class ScaleStep:
    """Scale what is inside a box (the whole picture, unless a centre crop was asked for) to a size."""

    box: Box
    size: Size
    how: Filter

    def picture(self, rgb: torch.Tensor, depth: int) -> torch.Tensor:
        """[H, W, C] to [h, w, C]."""
        return resample.resize(CropStep(self.box).plane(rgb), *self.size, self.how, depth=depth)

    def plane(self, plane: torch.Tensor) -> torch.Tensor:
        """[H, W] to [h, w], bilinearly whatever the filter."""
        return resample.resize_plane(CropStep(self.box).plane(plane), *self.size)

    def samples(self, samples: Samples, grey: Samples) -> Samples | None:
        """Scaled pixels are no longer the file's own, unless the size stays."""
        return CropStep(self.box).samples(samples, grey) if self.size == self.box[2:] else None

    def added(self) -> torch.Tensor | None:
        """Nothing is added."""
        return None


@dataclass(frozen=True)
class PadStep:
    """Extend a picture on any side; `feathering` is how far the new part's mask reaches into the old one."""

    inner: Size
    left: int
    top: int
    right: int
    bottom: int
    feathering: int

    @property
    def size(self) -> Size:
        """The size after this step."""
        return Size(self.left + self.inner.width + self.right, self.top + self.inner.height + self.bottom)

    def picture(self, rgb: torch.Tensor, depth: int) -> torch.Tensor:  # noqa: ARG002 - as every step
        """[H, W, C] onto middle grey."""
        return self._onto(torch.full((self.size.height, self.size.width, rgb.shape[-1]), GREY), rgb)

    def plane(self, plane: torch.Tensor) -> torch.Tensor:
        """[H, W] onto 0."""
        return self._onto(torch.zeros(self.size.height, self.size.width), plane)

    def samples(self, samples: Samples, grey: Samples) -> Samples | None:
        """The file's own values, `grey` around them."""
        out = np.empty((self.size.height, self.size.width, 3), samples.dtype)
        out[:] = grey
        out[self.top : self.top + self.inner.height, self.left : self.left + self.inner.width] = samples
        return out

    def added(self) -> torch.Tensor | None:
        """The mask [h, w] of the new part: 1 there, inside it falls as a square over `feathering` pixels."""
        return self._onto(torch.ones(self.size.height, self.size.width), self._feather())

    def _onto(self, canvas: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        canvas[self.top : self.top + self.inner.height, self.left : self.left + self.inner.width] = inner
        return canvas

    def _feather(self) -> torch.Tensor:
        width, height = self.inner
        reach = self.feathering
        if reach == 0 or 2 * reach >= height or 2 * reach >= width:
            return torch.zeros(height, width)
        far = np.full(1, np.inf)
        rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
        distances = (
            rows if self.top else far,
            height - rows if self.bottom else far,
            columns if self.left else far,
            width - columns if self.right else far,
        )
        nearest = np.broadcast_to(reduce(np.minimum, distances), (height, width))
        share = np.clip((reach - nearest) / reach, 0, None)
        return torch.from_numpy((share * share).astype(np.float32))


Step = CropStep | ScaleStep | PadStep


@dataclass(frozen=True)
class Geometry:
    """The steps from a source of one size to a canvas of another."""

    source: Size
    steps: tuple[Step, ...] = ()
    planned_by: str = "prepare"
    """Where the operations stand in the job."""

    @property
    def size(self) -> Size:
        """The canvas's size."""
        return self.steps[-1].size if self.steps else self.source

    @property
    def pads(self) -> bool:
        """Whether any step extends the picture."""
        return any(isinstance(step, PadStep) for step in self.steps)

    def carry(self, mask: torch.Tensor, field: str = "mask") -> torch.Tensor:
        """Take a mask [H, W] of the source's size along: cropped alike, scaled bilinearly, padded with 0.

        Raises:
            MaskError: its size is not the source's.

        """
        check_size(mask, "source", {"source": self.source}, field)
        return reduce(lambda plane, step: step.plane(plane), self._timely(), mask)

    def picture(self, rgb: torch.Tensor, depth: int = 8) -> torch.Tensor:
        """Take a picture [H, W, C] of the source's size through the steps."""
        return reduce(lambda picture, step: step.picture(picture, depth), self._timely(), rgb)

    def samples(self, samples: Samples | None, grey: Samples | None = None) -> Samples | None:
        """Take the file's own values [H, W, 3] through the steps; None once a step has made new ones.

        `grey` is GREY in the file's own space, [3], for what is added; half of full scale if left out.
        """
        for step in self.steps:
            if samples is None:
                return None
            full = np.iinfo(samples.dtype).max
            samples = step.samples(
                samples, np.full(3, full // 2 + 1, samples.dtype) if grey is None else grey
            )
        return samples

    def added(self) -> torch.Tensor:
        """The mask [h, w] of all that `pad` steps added, taken through later steps like any mask."""
        mask = torch.zeros(self.source.height, self.source.width)
        for step in self._timely():
            new = step.added()
            mask = step.plane(mask) if new is None else torch.maximum(step.plane(mask), new)
        return mask

    def _timely(self) -> Iterator[Step]:
        """The steps, each while there is time for it."""
        for step in self.steps:
            time_limit.check(self.planned_by)
            yield step


def check_size(mask: torch.Tensor, at: At, known: Mapping[At, Size], field: str) -> None:
    """Refuse a mask [H, W] whose size is not `known[at]`: masks are never resized in silence."""
    wrong = misfit(field, Size(mask.shape[1], mask.shape[0]), at, known)
    if wrong is not None:
        fix = f"write {wrong.suggestion}" if wrong.suggestion else MISFIT_FIX
        raise MaskError(wrong.message, field=field, value=wrong.given, fix=fix)


def plan(
    source: Size, ops: Sequence[PrepareOp], max_pixels: int, field: str, *, compat: bool = False
) -> Geometry:
    """Work out the steps of `prepare` or `finish` from the source's size.

    Args:
        source: pixels.
        ops: in order.
        max_pixels: the most that any step may make.
        field: where the ops stand in the job: "prepare".
        compat: a crop that reaches over the border is made smaller, as in the reference, instead of refused.

    Raises:
        InputError: a crop over the border, or a step that makes too large a picture.

    """
    steps: list[Step] = []
    size = source
    for index, op in enumerate(ops):
        where = f"{field}[{index}]"
        step = _step(size, op, where, compat=compat)
        if step is None:
            continue
        _check_pixels(step.size, max_pixels, where, op.op)
        steps.append(step)
        size = step.size
    return Geometry(source, tuple(steps), field)


def _check_pixels(size: Size, max_pixels: int, field: str, op: str) -> None:
    if size.width * size.height > max_pixels or max(size) > MAX_SIDE:
        fix = f"make it smaller; this farm makes up to {max_pixels} pixels and {MAX_SIDE} a side"
        raise InputError(f"{op} would make a picture of {size} pixels", field=field, value=str(size), fix=fix)


def _step(size: Size, op: PrepareOp, field: str, *, compat: bool) -> Step | None:
    if isinstance(op, Crop):
        return CropStep(_crop_box(size, op, field, compat=compat))
    if isinstance(op, Pad):
        return PadStep(size, op.left, op.top, op.right, op.bottom, op.feathering)
    if isinstance(op, ScaleBy):
        whole = Box(0, 0, *size)
        target = Size(round(size.width * op.factor), round(size.height * op.factor))
        return ScaleStep(whole, _at_least_one(target, size, op, field), op.filter)
    return _scale(size, op)


def _at_least_one(target: Size, size: Size, op: ScaleBy, field: str) -> Size:
    if min(target) < 1:
        fix = f"use a factor of at least {1 / min(size):.4g}"
        raise InputError(
            f"scaling {size} pixels leaves nothing", field=f"{field}.factor", value=op.factor, fix=fix
        )
    return target


def _crop_box(size: Size, op: Crop, field: str, *, compat: bool) -> Box:
    if compat:
        x, y = min(op.x, size.width - 1), min(op.y, size.height - 1)
        return Box(x, y, min(op.width, size.width - x), min(op.height, size.height - y))
    if op.x + op.width > size.width or op.y + op.height > size.height:
        box = f"{op.width} x {op.height} at ({op.x}, {op.y})"
        fix = "keep the box inside the picture, or pad the picture first"
        raise InputError(
            f"the crop {box} reaches over the border of {size} pixels", field=field, value=box, fix=fix
        )
    return Box(op.x, op.y, op.width, op.height)


def _scale(size: Size, op: Scale) -> ScaleStep | None:
    width, height = op.width, op.height
    if width == 0 and height == 0:
        return None
    if width == 0:
        width = max(1, round(size.width * height / size.height))
    elif height == 0:
        height = max(1, round(size.height * width / size.width))
    box = centre_box(size, Size(width, height)) if op.crop == "center" else Box(0, 0, *size)
    return ScaleStep(box, Size(width, height), op.filter)


def centre_box(size: Size, target: Size) -> Box:
    """The largest centred part that has the target's aspect, its margins rounded half to even.

    At the least a line of one pixel, or of two where the side is even; the reference fails on nothing left.
    """
    old, new = size.width / size.height, target.width / target.height
    x = round((size.width - size.width * (new / old)) / 2) if old > new else 0
    y = round((size.height - size.height * (old / new)) / 2) if old < new else 0
    x, y = min(x, (size.width - 1) // 2), min(y, (size.height - 1) // 2)
    return Box(x, y, size.width - 2 * x, size.height - 2 * y)
