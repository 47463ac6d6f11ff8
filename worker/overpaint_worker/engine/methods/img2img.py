"""Basic image to image: the whole picture is encoded and denoised; a mask only limits what is put back."""

from __future__ import annotations

from overpaint_worker.engine.methods.base import Scene, Start


def begin(scene: Scene) -> Start:
    """The picture as it is, noise everywhere."""
    return Start(picture=scene.fit.to_model(scene.picture), noise_mask=None)
