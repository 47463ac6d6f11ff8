"""Conditioning: what a prompt tells a denoiser, as named tensors that rows of one pass can share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

TEXT = "text"
"""The tensor [1, tokens, D] that cross-attention reads; the only one whose length may differ between rows."""


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
