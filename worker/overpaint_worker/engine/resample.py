"""The five filters of the reference's Upscale Image, on pictures [H, W, C], planes [H, W] and latents.

None but `lanczos` smooths before it scales down, as in the reference; `bicubic` (a = -0.75) may leave 0..1.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

Filter = Literal["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]


def resize(picture: torch.Tensor, width: int, height: int, how: Filter, *, depth: int = 8) -> torch.Tensor:
    """Scale float32 [H, W, C] to [height, width, C].

    `lanczos` works on whole levels of 8 bits, cut off, not rounded, as the reference does; at a `depth` of 16
    it works in float and keeps every bit.
    """
    if how == "lanczos":
        return _lanczos_levels(picture, width, height) if depth == 8 else _lanczos(picture, width, height)
    planes = picture.movedim(-1, 0).unsqueeze(0)
    return interpolate(planes, width, height, how).squeeze(0).movedim(0, -1).contiguous()


def resize_plane(plane: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Scale a mask or an alpha channel, float32 [H, W], bilinearly and without antialiasing."""
    return interpolate(plane[None, None], width, height, "bilinear")[0, 0]


def interpolate(planes: torch.Tensor, width: int, height: int, how: Filter) -> torch.Tensor:
    """Scale float32 [N, C, H, W]; every filter but `lanczos`, which knows pictures only."""
    if how in {"bilinear", "bicubic"}:
        return functional.interpolate(planes, size=(height, width), mode=how, align_corners=False)
    return functional.interpolate(planes, size=(height, width), mode=how)


def _lanczos_levels(picture: torch.Tensor, width: int, height: int) -> torch.Tensor:
    levels = np.clip(picture.numpy() * np.float32(255), 0, 255).astype(np.uint8)
    scaled = Image.fromarray(levels).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(scaled).astype(np.float32) / np.float32(255))


def _lanczos(picture: torch.Tensor, width: int, height: int) -> torch.Tensor:
    channels = (Image.fromarray(np.ascontiguousarray(channel.numpy())) for channel in picture.unbind(-1))
    scaled = [np.asarray(channel.resize((width, height), Image.Resampling.LANCZOS)) for channel in channels]
    return torch.from_numpy(np.clip(np.stack(scaled, axis=-1), 0, 1))
