"""Repaint methods, one file each: how a canvas and a mask become what is encoded, and the mask on the noise.

Methods know no families: they get the canvas with the way it fits the model's grid, and give pictures and
masks.
"""

from __future__ import annotations

from typing import Final

from overpaint_shared.errors import UnsupportedError
from overpaint_worker.engine.methods import (
    controlnet_inpaint,
    img2img,
    inpaint_model,
    latent_noise_mask,
    vae_encode_inpaint,
)
from overpaint_worker.engine.methods.base import Begin, Hint, Scene, Start, fit_hint

METHODS: Final[dict[str, Begin]] = {
    "img2img": img2img.begin,
    "vae_encode_inpaint": vae_encode_inpaint.begin,
    "latent_noise_mask": latent_noise_mask.begin,
    "controlnet_inpaint": controlnet_inpaint.begin,
    "inpaint_model": inpaint_model.begin,
}
"""By the spec's `method.kind`."""

__all__ = ["METHODS", "Hint", "Scene", "Start", "begin", "fit_hint"]


def begin(kind: str, scene: Scene) -> Start:
    """What the method of that name makes of the scene. Raises `UnsupportedError` if there is none."""
    if kind not in METHODS:
        raise UnsupportedError(
            f"this version does not render the method {kind!r}",
            field="method.kind", value=kind, fix=f"use one of {', '.join(METHODS)}",
        )  # fmt: skip
    return METHODS[kind](scene)
