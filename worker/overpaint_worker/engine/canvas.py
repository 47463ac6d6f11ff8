"""The picture as it will be rendered: `prepare` applied, with the way a mask takes to the same place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from overpaint_shared.errors import InputError
from overpaint_shared.job import PrepareOp
from overpaint_shared.settings import Limits

from . import encode
from .deep_png import Samples
from .geometry import GREY, Geometry, Size, plan
from .picture import Picture


@dataclass(frozen=True, eq=False)
class Canvas:
    """A prepared picture.

    Attributes:
        rgb: float32 [H, W, 3] in sRGB; 0..1, but bicubic scaling may leave that range a little.
        alpha: float32 [H, W], 1 = opaque, or None; 0 where the picture was extended.
        pad_mask: float32 [H, W], 1 where the picture was extended, softened inward by `feathering`.
        geometry: takes masks of the source's size here.
        samples: the file's own values [H, W, 3], while no step has made new ones.
        icc: the profile that the result returns to.
        depth: bits a sample.

    """

    rgb: torch.Tensor
    alpha: torch.Tensor | None
    pad_mask: torch.Tensor
    geometry: Geometry
    samples: Samples | None
    icc: bytes | None
    depth: Literal[8, 16]

    @property
    def size(self) -> Size:
        """Pixels."""
        return self.geometry.size

    def carry(self, mask: torch.Tensor, field: str = "mask") -> torch.Tensor:
        """Take a mask [H, W] of the source's size onto this canvas; raises MaskError for any other size."""
        return self.geometry.carry(mask, field)


def prepare(
    picture: Picture,
    ops: Sequence[PrepareOp],
    limits: Limits,
    *,
    compat: bool = False,
    field: str = "prepare",
) -> Canvas:
    """Apply the operations of `prepare`, in order.

    `compat` crops as the reference does, and keeps no alpha; all else is the reference's in any case.

    Raises:
        InputError: an operation does not fit the picture or makes too large a one, or there is none and the
            picture is too large; nothing was allocated.

    """
    source = Size(picture.width, picture.height)
    geometry = plan(source, ops, limits.max_output_pixels, field, compat=compat)
    if not geometry.steps and picture.width * picture.height > limits.max_output_pixels:
        fix = f"scale it down in `{field}`; this farm renders up to {limits.max_output_pixels} pixels"
        raise InputError(
            f"the picture of {source} pixels is too large to render",
            field="source.image",
            value=str(source),
            fix=fix,
        )
    return Canvas(
        rgb=geometry.picture(picture.rgb, picture.depth),
        alpha=None if picture.alpha is None or compat else geometry.carry(picture.alpha, field),
        pad_mask=geometry.added(),
        geometry=geometry,
        samples=geometry.samples(picture.samples, _grey(picture, compat=compat)),
        icc=picture.icc,
        depth=picture.depth,
    )


def _grey(picture: Picture, *, compat: bool) -> Samples:
    """What `pad` paints, as the result's file will hold it [3]."""
    levels = encode.quantise(
        encode.in_space(torch.full((1, 1, 3), GREY), picture.icc), picture.depth, truncate=compat
    )
    return np.asarray(levels[0, 0])


def finish(
    rgb: torch.Tensor, ops: Sequence[PrepareOp], limits: Limits, *, compat: bool = False, depth: int = 8
) -> tuple[torch.Tensor, Geometry]:
    """Apply the operations of `finish` to a rendered picture [H, W, 3].

    Returns it with the geometry, which takes the mask and the alpha channel along.

    Raises:
        InputError: as `prepare`.

    """
    geometry = plan(Size(rgb.shape[1], rgb.shape[0]), ops, limits.max_output_pixels, "finish", compat=compat)
    return geometry.picture(rgb, depth), geometry
