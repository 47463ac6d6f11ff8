"""Conditioning: what a prompt tells a denoiser, as named tensors that rows of one pass can share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overpaint_worker.engine.families.vae import SCALE_FACTOR

TEXT = "text"
"""The tensor [1, tokens, D] that cross-attention reads; the only one whose length may differ between rows."""
POOLED = "pooled"
"""The tensor [1, P] that stands for the whole prompt, of families that want one."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """Named tensors, each with one leading row: {"text": [1, 77 n, D]} and whatever else a family needs."""

    tensors: dict[str, Tensor]

    def signature(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Rows of equal signatures can share a pass.

        The length of the text is no part of it: texts of different length meet at their least common multiple
        by repetition, which changes nothing, as attention is a weighted mean over tokens. Zeros would count.
        """
        return tuple((name, _fixed_shape(name, tensor)) for name, tensor in sorted(self.tensors.items()))

    @property
    def tokens(self) -> int:
        """Length of the text: a multiple of 77."""
        return self.tensors[TEXT].shape[1]

    @property
    def nbytes(self) -> int:
        """Memory that the tensors hold."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def network_options(conditioning: Mapping[str, Tensor], seen: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Rows of conditioning as diffusers' UNets and ControlNets take them, with the rows' latents `seen`.

    A family with a pooled text is told sizes too: height and width of the picture it came from, of what was
    cropped at the top and left, and of the picture to be made. As in the reference, both pictures are the one
    in work and nothing was cropped; so the sizes follow from the latent, and always fit it.
    """
    options: dict[str, Any] = {"encoder_hidden_states": conditioning[TEXT].to(dtype)}
    if POOLED in conditioning:
        height, width = (side * SCALE_FACTOR for side in seen.shape[-2:])
        sizes = seen.new_tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        options["added_cond_kwargs"] = {
            "text_embeds": conditioning[POOLED].to(dtype),
            "time_ids": sizes.expand(len(seen), -1),
        }
    return options


def _fixed_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape[1:])
    return shape[1:] if name == TEXT else shape


class ConditioningCache:
    """The conditionings used last, up to `limit_bytes` of tensors. For the one thread that runs the model."""

    def __init__(self, limit_bytes: int = 64 * 2**20) -> None:
        self._limit_bytes = limit_bytes
        self._held: OrderedDict[Hashable, Conditioning] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, make: Callable[[], Conditioning]) -> Conditioning:
        """The conditioning of `key`, made if it is not held."""
        found = self._held.get(key)
        if found is None:
            found = self._held[key] = make()
            self._bytes += found.nbytes
            self._evict()
        else:
            self._held.move_to_end(key)
        return found

    def _evict(self) -> None:
        while self._bytes > self._limit_bytes and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= oldest.nbytes
