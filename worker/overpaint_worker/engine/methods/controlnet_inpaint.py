"""ControlNet Inpaint: a ControlNet that sees the picture with a hole guides a model over either latent."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from overpaint_shared.job import ControlnetInpaint
from overpaint_worker.engine.methods import latent_noise_mask, vae_encode_inpaint
from overpaint_worker.engine.methods.base import Begin, Hint, Scene, Start

_OVER: Final[dict[str, Begin]] = {
    "vae_encode_inpaint": vae_encode_inpaint.begin,
    "latent_noise_mask": latent_noise_mask.begin,
}
"""By the spec's `method.latent`."""
HOLE = -1.0
"""What the nets were trained to see where the picture is to be repainted: no colour at all."""


def begin(scene: Scene) -> Start:
    """Start as `latent` says, with the picture, holes in it, as a hint."""
    method = scene.method
    if not isinstance(method, ControlnetInpaint):
        raise TypeError(f"settings of {method.kind} for controlnet_inpaint")
    hint = Hint(
        controlnet=method.controlnet,
        picture=scene.hint(holed(scene.picture, scene.required_mask())),
        strength=method.strength, start=method.start, end=method.end, field="method.controlnet",
    )  # fmt: skip
    return replace(_OVER[method.latent](scene), hints=(hint,))


def holed(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture [H, W, 3] with -1 in all channels where the mask [H, W] is above one half."""
    return torch.where((mask > 0.5).unsqueeze(-1), HOLE, picture)
