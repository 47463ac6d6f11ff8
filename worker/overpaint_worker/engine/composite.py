"""One picture over another, by a mask: float32 [H, W, C] and [H, W], mask 1 = the upper one."""

from __future__ import annotations

import torch

from overpaint_shared.errors import InputError

from . import morphology, resample


def composite(original: torch.Tensor, result: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The result [H, W, C] where the mask [H, W] is 1, the original bit for bit where it is 0, or a mix."""
    if not original.shape[:2] == result.shape[:2] == mask.shape:
        raise ValueError(f"sizes differ: {original.shape}, {result.shape}, {mask.shape}")
    out = original.clone()
    box = morphology.around((mask != 0).numpy(), 0)
    weight, under = mask[box].unsqueeze(-1), original[box]
    out[box] = torch.where(weight == 0, under, weight * result[box] + (1 - weight) * under)
    return out


def composite_at(
    destination: torch.Tensor,
    source: torch.Tensor,
    x: int,
    y: int,
    mask: torch.Tensor | None = None,
    *,
    resize_source: bool = False,
    compat: bool = False,
) -> torch.Tensor:
    """Put a picture onto another at a place (the reference's ImageCompositeMasked).

    Args:
        destination: float32 [H, W, C].
        source: float32 [h, w, c]; channels beyond the destination's are dropped, a missing alpha is opaque.
        x: where the source's corner comes to lie; what reaches over the border is cut.
        y: the same, downward.
        mask: float32 of any size, scaled to the source's; None: the whole source.
        resize_source: scale the source to the destination's size first.
        compat: an RGB source on an RGBA destination fails, as in the reference.

    Raises:
        InputError: under `compat`, the destination has more channels than the source.

    """
    height, width, channels = destination.shape
    if resize_source:
        source = resample.resize(source, width, height, "bilinear")
    source = _with_channels(source, channels, compat=compat)
    weight = torch.ones(source.shape[:2]) if mask is None else mask
    weight = resample.resize_plane(weight, source.shape[1], source.shape[0])
    x, y = min(x, width), min(y, height)
    rows, columns = min(source.shape[0], height - y), min(source.shape[1], width - x)
    weight = weight[:rows, :columns, None]
    out = destination.clone()
    under = out[y : y + rows, x : x + columns]
    under.copy_(weight * source[:rows, :columns] + (1 - weight) * under)
    return out


def _with_channels(source: torch.Tensor, channels: int, *, compat: bool) -> torch.Tensor:
    missing = channels - source.shape[-1]
    if missing > 0 and compat:
        fix = "drop the destination's alpha channel, or leave compat"
        value = f"{source.shape[-1]} on {channels} channels"
        raise InputError(
            "the reference cannot put this on a picture with more channels",
            field="compat",
            value=value,
            fix=fix,
        )
    opaque = torch.ones(*source.shape[:2], max(missing, 0))
    return torch.cat([source[..., :channels], opaque], dim=-1)
