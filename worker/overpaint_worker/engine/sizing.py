"""From the canvas to a size the model can take, whose sides are multiples of 8, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overpaint_shared.errors import InputError

from .geometry import Size

MULTIPLE = 8


@dataclass(frozen=True)
class Fit:
    """How a canvas meets the model.

    Attributes:
        canvas: the canvas's size.
        model: the size the model works at.
        left: where the canvas's corner lies in the model's picture; negative where the canvas is cropped.
        top: the same, downward.

    """

    canvas: Size
    model: Size
    left: int
    top: int

    @property
    def output(self) -> Size:
        """The size of what comes back: the canvas's, or the model's where the canvas is cropped."""
        return Size(min(self.canvas.width, self.model.width), min(self.canvas.height, self.model.height))

    def to_model(self, canvas: torch.Tensor) -> torch.Tensor:
        """A picture [H, W, C] or mask [H, W] of the canvas at the model's size: cropped or edges repeated.

        The very one where it has that size.
        """
        if self.canvas == self.model:
            return canvas
        rows = _indices(self.canvas.height, self.model.height, self.top)
        columns = _indices(self.canvas.width, self.model.width, self.left)
        return canvas[rows][:, columns]

    def from_model(self, model: torch.Tensor) -> torch.Tensor:
        """A picture or mask of the model's size, less what `to_model` added."""
        top, left = max(self.top, 0), max(self.left, 0)
        return model[top : top + self.output.height, left : left + self.output.width]

    def kept(self, canvas: torch.Tensor) -> torch.Tensor:
        """The part of the canvas that `from_model` gives back: what a result is put over."""
        top, left = max(-self.top, 0), max(-self.left, 0)
        return canvas[top : top + self.output.height, left : left + self.output.width]


def _indices(length: int, wanted: int, offset: int) -> torch.Tensor:
    return (torch.arange(wanted) - offset).clamp(0, length - 1)


def pad_to_multiple(canvas: Size, multiple: int = MULTIPLE) -> Fit:
    """Repeat the edges on all sides, as evenly as can be, until each side is a multiple; nothing is lost."""
    model = Size(-(-canvas.width // multiple) * multiple, -(-canvas.height // multiple) * multiple)
    return Fit(canvas, model, (model.width - canvas.width) // 2, (model.height - canvas.height) // 2)


def centre_crop(canvas: Size, multiple: int = MULTIPLE, field: str = "source.image") -> Fit:
    """Cut each side to a multiple, as the reference does; up to `multiple` - 1 pixels are lost.

    Raises:
        InputError: a side is shorter than one multiple.

    """
    if min(canvas) < multiple:
        fix = f"scale it up to {multiple} pixels a side or more, or leave compat"
        raise InputError(
            f"the canvas of {canvas} pixels is too small for the model",
            field=field,
            value=str(canvas),
            fix=fix,
        )
    model = Size(canvas.width // multiple * multiple, canvas.height // multiple * multiple)
    return Fit(canvas, model, -(canvas.width % multiple // 2), -(canvas.height % multiple // 2))
