"""Rows: what one forward pass of the denoiser is made of, and the buffers that hold them.

A row is one latent at one noise level under one conditioning. The rows of a pass lie in contiguous buffers
that are allocated once and padded to a bucket (1, 2, 4, 8, 16 rows), so that a pass is one of few shapes:
kernels are chosen once, and compilation and CUDA graphs stay possible.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from overpaint_worker.engine.families.conditioning import TEXT, Conditioning

if TYPE_CHECKING:
    from overpaint_worker.engine.controls import Control

BUCKETS: Final = (1, 2, 4, 8, 16)
"""Rows of a pass."""

DETERMINISTIC_ROWS: Final = 4
"""The bucket of every pass of `deterministic` jobs: same kernels, so same bits, whatever the company."""

KEPT_BUFFERS: Final = 32
"""Sets of buffers that are kept; the one used longest ago goes first."""


@dataclass(slots=True, frozen=True)
class Row:
    """One row of a pass."""

    x: Tensor
    """[1, C, h, w], float32."""
    sigma: Tensor
    """Scalar, float32."""
    conditioning: Conditioning
    extra: Tensor | None = None
    """[1, E, h, w]: channels that inpainting models want beside the latent."""
    controls: tuple[Control, ...] = ()
    """The ControlNets that act on it at this sigma."""


def bucket_of(rows: int) -> int:
    """The smallest bucket that holds `rows`. Raises `ValueError` above the largest."""
    for bucket in BUCKETS:
        if rows <= bucket:
            return bucket
    raise ValueError(f"{rows} rows do not fit a pass of at most {BUCKETS[-1]}")


def common_tokens(lengths: Iterable[int]) -> int:
    """The length at which texts of these lengths meet by repetition: their least common multiple."""
    return reduce(math.lcm, lengths)


class RowBuffers:
    """The inputs of a pass of `bucket` rows, allocated once and filled anew for each pass."""

    def __init__(self, like: Row, bucket: int, tokens: int) -> None:
        self.bucket = bucket
        self.x = _room(like.x, bucket)
        self.sigma = torch.empty(bucket, dtype=torch.float32)  # on the CPU, where the model's time is found
        self.extra = None if like.extra is None else _room(like.extra, bucket)
        self.conditioning = {
            name: tensor.new_empty(
                bucket, *((tokens, *tensor.shape[2:]) if name == TEXT else tensor.shape[1:])
            )
            for name, tensor in like.conditioning.tensors.items()
        }
        self._held: list[Conditioning | None] = [None] * bucket
        """What each row's conditioning was copied from: from pass to pass it is mostly the same."""

    def fill(self, rows: Sequence[Row]) -> None:
        """Write `rows`, 1..bucket of them; the rest repeats the first, a real row: it holds no NaN."""
        padded = [*rows, *[rows[0]] * (self.bucket - len(rows))]
        torch.stack([row.sigma for row in padded], out=self.sigma)
        torch.cat([row.x for row in padded], out=self.x)
        if self.extra is not None:
            torch.cat([row.extra for row in padded if row.extra is not None], out=self.extra)
        for i, row in enumerate(padded):
            if self._held[i] is not row.conditioning:
                for name, tensor in row.conditioning.tensors.items():
                    _repeat_into(self.conditioning[name][i], tensor[0], text=name == TEXT)
                self._held[i] = row.conditioning


def _room(like: Tensor, rows: int) -> Tensor:
    return torch.empty((rows, *like.shape[1:]), dtype=like.dtype, device=like.device)


def _repeat_into(target: Tensor, source: Tensor, *, text: bool) -> None:
    if text and len(target) != len(source):
        target.view(-1, *source.shape).copy_(source)  # a text repeated whole means the same as once
    else:
        target.copy_(source)


class BufferPool:
    """Buffers by shape of pass, the last used ones kept."""

    def __init__(self, kept: int = KEPT_BUFFERS) -> None:
        self._kept = kept
        self._pool: OrderedDict[Hashable, RowBuffers] = OrderedDict()

    def get(self, rows: Sequence[Row], bucket: int) -> RowBuffers:
        """Buffers for these rows in a pass of `bucket`, filled."""
        first, tokens = rows[0], common_tokens(row.conditioning.tokens for row in rows)
        extra = None if first.extra is None else first.extra.shape[1]
        shape = (first.x.shape, first.x.device, extra, first.conditioning.signature())
        key = (shape, _dtypes(first.conditioning), tokens, bucket)
        buffers = self._pool.pop(key, None) or RowBuffers(first, bucket, tokens)
        self._pool[key] = buffers
        while len(self._pool) > self._kept:
            self._pool.popitem(last=False)
        buffers.fill(rows)
        return buffers

    def clear(self) -> None:
        """Give the memory back."""
        self._pool.clear()


def _dtypes(conditioning: Conditioning) -> tuple[torch.dtype, ...]:
    return tuple(tensor.dtype for _, tensor in sorted(conditioning.tensors.items()))
