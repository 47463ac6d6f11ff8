"""What methods are given and what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from overpaint_shared.job import Method
from overpaint_worker.engine.sizing import Fit

GREY = 0.5
"""What masked pixels become before encoding: 0 in the VAE's range of -1 to 1."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A prepared job, seen by its method."""

    picture: Tensor
    """The canvas, float32 [H, W, 3], 0..1."""
    mask: Tensor | None
    """float32 [H, W], 0..1, 1 = repaint; None: everywhere."""
    method: Method
    """The spec's own settings of the method."""
    fit: Fit
    """The way from the canvas to the model's size."""
    compat: bool
    """Behave as the reference does, defects included."""

    def required_mask(self) -> Tensor:
        """The mask of a method that cannot do without one; the spec's rules make sure that there is one."""
        if self.mask is None:
            raise ValueError(f"the method {self.method.kind} needs a mask")
        return self.mask


@dataclass(frozen=True, eq=False)
class Start:
    """Where a trajectory begins, still in pixels."""

    picture: Tensor
    """What is encoded, float32 [h, w, 3] of the model's size."""
    noise_mask: Tensor | None
    """Where noise acts, float32 [*, *], to be scaled bilinearly to the latent; None: everywhere."""


Begin = Callable[[Scene], Start]


def greyed(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture [h, w, 3] with grey where the mask [h, w], rounded half to even, is 1."""
    kept = 1 - torch.round(mask).unsqueeze(-1)
    return (picture - GREY) * kept + GREY
