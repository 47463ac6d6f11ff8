"""VAEs: pictures to scaled latents and back, in units of work.

A unit is a layer or a few of the network on one tile, so that the loop can step between units; cutting the
network into units changes no bit. Cutting the picture into tiles does change pixels (each tile is normalised
by itself), so tiles follow the picture's size alone and never the memory that happens to be free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Final, cast

import structlog
import torch
from torch import Tensor
from torch.nn import Module

from overpaint_shared.errors import PrecisionError

if TYPE_CHECKING:
    from overpaint_worker.engine.families import Work

log: Final = structlog.get_logger(__name__)

SCALE_FACTOR: Final = 8
"""Pixels per latent cell, along each side."""

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Tiling:
    """When and how a picture is cut. All in pixels, multiples of 8."""

    above: int = 1536 * 1536
    """Pictures of more pixels than this are cut."""
    tile: int = 1024
    """Side of a tile."""
    overlap: int = 256
    """What neighbours share at least, blended from one to the other."""

    def applies(self, height: int, width: int) -> bool:
        """Whether a picture of this size is cut."""
        return height * width > self.above


@dataclass(frozen=True, slots=True)
class Span:
    """A tile's place along one side, in latent cells."""

    start: int
    length: int
    fade_in: int
    fade_out: int

    def window(self, scale: int) -> Tensor:
        """The tile's weight along the side, `scale` values per cell."""
        window = torch.ones(self.length * scale)
        rise, fall = self.fade_in * scale, self.fade_out * scale
        window[:rise] *= (torch.arange(rise) + 0.5) / max(rise, 1)
        window[len(window) - fall :] *= ((torch.arange(fall) + 0.5) / max(fall, 1)).flip(0)
        return window

    def cut(self, scale: int) -> slice:
        """The tile's part of the side."""
        return slice(self.start * scale, (self.start + self.length) * scale)


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Tiles of equal length, evenly spread over a side of `length` cells, sharing `overlap` cells or more."""
    if length <= tile:
        return [Span(0, length, 0, 0)]
    count = math.ceil((length - overlap) / (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    shared = [tile - (right - left) for left, right in pairwise(starts)]
    return [
        Span(start, tile, before, after)
        for start, before, after in zip(starts, [0, *shared], [*shared, 0], strict=True)
    ]


class Vae:
    """One VAE on one device. Float32 in and out, whatever it computes in."""

    def __init__(self, vae: Module, device: torch.device, tiling: Tiling | None = None) -> None:
        self._vae = cast("Any", vae)
        self._device = device
        self._tiling = tiling or Tiling()
        self._scaling = float(self._vae.config.scaling_factor)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self._vae.config.latent_channels)

    def encode(self, px: Tensor) -> Work[Tensor]:
        """[1, 3, H, W] in 0..1, sides multiples of 8 -> the posterior's mean, scaled, [1, C, H/8, W/8].

        Computed in the picture's own memory format; the latent is contiguous.
        """
        height, width = px.shape[-2:]
        if height % SCALE_FACTOR or width % SCALE_FACTOR:
            raise ValueError(
                f"a VAE takes sides that are multiples of {SCALE_FACTOR}, not {width} x {height}"
            )
        x = px.to(self._device, torch.float32) * 2 - 1
        moments = yield from self._run(self._encoder, x, SCALE_FACTOR, 1)
        return (moments[:, : self.latent_channels] * self._scaling).contiguous()

    def decode(self, z: Tensor) -> Work[Tensor]:
        """Scaled latent [1, C, h, w] -> [1, 3, 8 h, 8 w], clamped to 0..1."""
        x = z.to(self._device, torch.float32) / self._scaling
        y = yield from self._run(self._decoder, x, 1, SCALE_FACTOR)
        return ((y + 1) / 2).clamp(0, 1)

    def _run(self, layers: Callable[[], Sequence[Layer]], x: Tensor, fine: int, out: int) -> Work[Tensor]:
        """`x` has `fine` values per latent cell, the result `out`. Half precision is left if it overflows.

        Raises:
            PrecisionError: float32 does, too, or bfloat16, whose range is the same.

        """
        y = yield from self._tiled(layers(), x, fine, out)
        if _are_numbers(y):
            return y
        if self._vae.dtype == torch.float16:
            log.warning(
                "half precision overflows in this VAE; it goes on in float32", action="vae_to_float32"
            )
            self._vae.to(torch.float32)
            y = yield from self._tiled(layers(), x, fine, out)
            if _are_numbers(y):
                return y
        raise PrecisionError(
            f"what the VAE makes are no numbers, computed in {str(self._vae.dtype).removeprefix('torch.')}",
            field="vae", value="nan", fix="name another VAE; the weights of this one are damaged",
        )  # fmt: skip

    def _tiled(self, layers: Sequence[Layer], x: Tensor, fine: int, out: int) -> Work[Tensor]:
        height, width = (side // fine for side in x.shape[-2:])
        if not self._tiling.applies(height * SCALE_FACTOR, width * SCALE_FACTOR):
            return (yield from self._units(layers, x))
        tile, overlap = self._tiling.tile // SCALE_FACTOR, self._tiling.overlap // SCALE_FACTOR
        total = share = torch.zeros(())
        places = list(product(spans(height, tile, overlap), spans(width, tile, overlap)))
        for place, (down, right) in enumerate(places):
            if place:
                yield
            y = yield from self._units(layers, x[..., down.cut(fine), right.cut(fine)].contiguous())
            if not place:
                total = y.new_zeros(*y.shape[:2], height * out, width * out)
                share = y.new_zeros(height * out, width * out)
            window = (down.window(out)[:, None] * right.window(out)).to(y.device)
            total[..., down.cut(out), right.cut(out)] += y * window
            share[down.cut(out), right.cut(out)] += window
        return total / share  # more than two tiles may share a place, so windows alone do not add up to 1

    def _units(self, layers: Sequence[Layer], x: Tensor) -> Work[Tensor]:
        x = x.to(self._vae.dtype)
        for place, layer in enumerate(layers):
            if place:
                yield
            x = layer(x)
        return x.to(torch.float32)

    def _encoder(self) -> list[Layer]:
        net: Any = self._vae.encoder
        quantise: Layer = self._vae.quant_conv if self._vae.quant_conv is not None else _same
        tail: Layer = lambda x: quantise(net.conv_out(net.conv_act(net.conv_norm_out(x))))  # noqa: E731
        blocks = [part for block in net.down_blocks for part in _parts(block, "downsamplers")]
        return [net.conv_in, *blocks, net.mid_block, tail]

    def _decoder(self) -> list[Layer]:
        net: Any = self._vae.decoder
        restore: Layer = self._vae.post_quant_conv if self._vae.post_quant_conv is not None else _same
        head: Layer = lambda x: net.conv_in(restore(x))  # noqa: E731
        tail: Layer = lambda x: net.conv_out(net.conv_act(net.conv_norm_out(x)))  # noqa: E731
        blocks = [part for block in net.up_blocks for part in _parts(block, "upsamplers")]
        return [head, net.mid_block, *blocks, tail]


def _are_numbers(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _same(x: Tensor) -> Tensor:
    return x


def _timeless(resnet: Any, x: Tensor) -> Tensor:
    result: Tensor = resnet(x, None)
    return result


def _parts(block: Any, samplers: str) -> Iterator[Layer]:
    """A block's layers in order: its residual layers (which get no time), then what changes the size."""
    for resnet in block.resnets:
        yield partial(_timeless, resnet)
    yield from getattr(block, samplers) or ()
