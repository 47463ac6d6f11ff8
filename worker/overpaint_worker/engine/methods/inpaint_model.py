"""Inpainting checkpoints: nine channels show the denoiser the mask and the picture without what it hides."""

from __future__ import annotations

from overpaint_worker.engine.methods.base import Scene, Start, greyed


def begin(scene: Scene) -> Start:
    """The picture as it is; beside it the picture greyed under the mask; noise under the mask, kept soft.

    Unlike with `latent_noise_mask`, the reference crops this mask as it crops the picture.
    """
    mask, picture = scene.fit.to_model(scene.required_mask()), scene.fit.to_model(scene.picture)
    return Start(picture=picture, noise_mask=mask, masked=greyed(picture, mask))
