"""VAE Encode (for Inpainting): masked pixels are greyed before encoding, noise acts under a grown mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation has it
from torch import Tensor

from overpaint_shared.job import ControlnetInpaint, VaeEncodeInpaint
from overpaint_worker.engine.methods.base import Scene, Start, greyed


def begin(scene: Scene) -> Start:
    """The picture greyed under the mask, not grown; noise under the mask grown and rounded to 0 or 1."""
    method = scene.method
    if not isinstance(method, VaeEncodeInpaint | ControlnetInpaint):
        raise TypeError(f"settings of {method.kind} for vae_encode_inpaint")
    mask = scene.fit.to_model(scene.required_mask())
    picture = scene.fit.to_model(scene.picture)
    return Start(picture=greyed(picture, mask), noise_mask=torch.round(grown(mask, method.grow_mask_by)))


def grown(mask: Tensor, by: int) -> Tensor:
    """A mask [h, w] rounded half to even, then the largest value in a window of `by` x `by` pixels.

    With an even `by` the mask grows one pixel further right and down than left and up; 0 leaves it as it is,
    unrounded.
    """
    if by == 0:
        return mask
    before = by // 2  # ceil((by - 1) / 2)
    after = by - 1 - before
    padded = F.pad(torch.round(mask)[None], (before, after, before, after))
    return F.max_pool2d(F.max_pool2d(padded, (by, 1), stride=1), (1, by), stride=1)[0]
