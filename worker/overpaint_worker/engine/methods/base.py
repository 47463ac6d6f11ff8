"""What methods are given and what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from overpaint_shared.job import Method
from overpaint_worker.engine.geometry import Size, centre_box
from overpaint_worker.engine.resample import resize
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

    def hint(self, picture: Tensor) -> Tensor:
        """A hint [H, W, 3] of any size, at the model's size."""
        return fit_hint(picture, self.fit, compat=self.compat)

    def required_mask(self) -> Tensor:
        """The mask of a method that cannot do without one; the spec's rules make sure that there is one."""
        if self.mask is None:
            raise ValueError(f"the method {self.method.kind} needs a mask")
        return self.mask


@dataclass(frozen=True, eq=False)
class Hint:
    """What a ControlNet is shown, and when it acts."""

    controlnet: str
    """The registry's name."""
    picture: Tensor
    """float32 [h, w, 3] of the model's size: 0..1, and -1 for holes."""
    strength: float
    start: float
    """Share of the full noise schedule, 0..1, whatever part of it the job runs."""
    end: float
    field: str
    """Where the spec names the ControlNet."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where a trajectory begins, still in pixels."""

    picture: Tensor
    """What is encoded, float32 [h, w, 3] of the model's size."""
    noise_mask: Tensor | None
    """Where noise acts, float32 [*, *], to be scaled bilinearly to the latent; None: everywhere."""
    hints: tuple[Hint, ...] = ()
    """For the method's own ControlNets."""
    masked: Tensor | None = None
    """For inpainting models: the picture without what the mask hides, as `picture`."""


Begin = Callable[[Scene], Start]


def fit_hint(picture: Tensor, fit: Fit, *, compat: bool) -> Tensor:
    """A hint [H, W, 3] at the model's size, by nearest neighbours, its centre cut out to the right aspect.

    It is made for the canvas, and goes the way of the canvas; the reference cuts it straight to the model's
    size, and so on sides that are no multiple of 8 scales a little what it only crops of the picture.
    """
    if compat:
        return _centred(picture, fit.model)
    return fit.to_model(_centred(picture, fit.canvas))


def _centred(picture: Tensor, size: Size) -> Tensor:
    box = centre_box(Size(picture.shape[1], picture.shape[0]), size)
    cut = picture[box.y : box.y + box.height, box.x : box.x + box.width]
    return resize(cut, size.width, size.height, "nearest-exact")


def greyed(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture [h, w, 3] with grey where the mask [h, w], rounded half to even, is 1."""
    kept = 1 - torch.round(mask).unsqueeze(-1)
    return (picture - GREY) * kept + GREY
