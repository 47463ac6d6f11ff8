"""Set Latent Noise Mask: the picture is encoded whole, noise acts only under the mask, which stays soft."""

from __future__ import annotations

from overpaint_worker.engine.methods.base import Scene, Start


def begin(scene: Scene) -> Start:
    """The picture as it is, and the mask fitted as the picture is.

    The reference crops the picture and not the mask, so that on sides that are no multiple of 8 the mask is
    shifted by up to 3.5 pixels; that is kept under `compat`.
    """
    mask = scene.required_mask()
    noise_mask = mask if scene.compat else scene.fit.to_model(mask)
    return Start(picture=scene.fit.to_model(scene.picture), noise_mask=noise_mask)
