"""CLIP text encoders: a prompt to the tensor that cross-attention reads.

The last layer's states, through the final layer norm (SDXL: those before the last layer, as they are),
without an attention mask, in float32. Prompts longer than 75 tokens are read in blocks that are laid end to
end. A weight moves a token's state away from the empty prompt's state at the same place:
`z = empty + weight * (z - empty)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from overpaint_shared.errors import UnsupportedError
from overpaint_worker.engine.families.conditioning import POOLED, TEXT, Conditioning, ConditioningCache
from overpaint_worker.engine.families.prompt import Block, blocks
from overpaint_worker.engine.families.vocabulary import Vocabulary


class ClipEncoder:
    """One text encoder on one device, and the vocabulary that it was trained on.

    `penultimate`: its states are those before the last layer, without the final norm, as SDXL wants them.
    """

    def __init__(
        self, encoder: Module, vocabulary: Vocabulary, device: torch.device, *, penultimate: bool = False
    ) -> None:
        self._encoder: Any = encoder
        self._device = device
        self._penultimate = penultimate
        self._vocabulary = vocabulary

    @property
    def layers(self) -> int:
        """Layers of the encoder."""
        return int(self._encoder.config.num_hidden_layers)

    def read(self, prompt: str, clip_skip: int) -> tuple[Tensor, Tensor | None]:
        """States [1, 77 n, D], and of an encoder with a projection what it makes of the first block [1, P].

        Weights act on the states alone.
        """
        read = self._blocks(prompt)
        states, pooled = self._states(read, clip_skip)
        if any(weight != 1 for block in read for weight in block.weights):
            empty, _ = self._states(self._blocks(""), clip_skip)
            states = _weighted(states, empty, read)
        return states.reshape(1, -1, states.shape[-1]), None if pooled is None else pooled[:1]

    def _blocks(self, prompt: str) -> list[Block]:
        return blocks(prompt, self._vocabulary.tokenize, self._vocabulary.marks)

    def _states(self, read: list[Block], clip_skip: int) -> tuple[Tensor, Tensor | None]:
        """[blocks, 77, D] and [blocks, P]."""
        ids = torch.tensor([block.ids for block in read], device=self._device)
        skipped = max(clip_skip, 1) if self._penultimate else clip_skip
        output = self._encoder(input_ids=ids, output_hidden_states=skipped > 0)
        pooled: Tensor | None = getattr(output, "text_embeds", None)
        if skipped == 0:
            return output.last_hidden_state, pooled
        states: Tensor = output.hidden_states[-1 - skipped]
        return states if self._penultimate else self._final_norm(states), pooled

    def _final_norm(self, states: Tensor) -> Any:
        # transformers 5.6 laid the text model's parts into the model itself.
        return getattr(self._encoder, "text_model", self._encoder).final_layer_norm(states)


class ClipText:
    """A model's text encoders, one or more, side by side. Remembers the prompts used last."""

    def __init__(self, *encoders: ClipEncoder) -> None:
        self._encoders = encoders
        self._cache = ConditioningCache()

    @property
    def layers(self) -> int:
        """Layers of the shortest encoder."""
        return min(encoder.layers for encoder in self._encoders)

    def condition(self, prompt: str, clip_skip: int = 0) -> Conditioning:
        """{"text": [1, 77 n, D]}, float32, the encoders' states joined along D; `clip_skip`: layers that are
        left out at the end. Where the last encoder has a projection also {"pooled": [1, P]}.

        Raises `UnsupportedError`: too many layers to skip. `JobError`: the prompt cannot be read.
        """
        if not 0 <= clip_skip < self.layers:
            raise UnsupportedError(
                f"this model's text encoder has {self.layers} layers",
                field="clip_skip", value=clip_skip, fix=f"use 0 to {self.layers - 1}",
            )  # fmt: skip
        return self._cache.get((prompt, clip_skip), lambda: self._condition(prompt, clip_skip))

    def _condition(self, prompt: str, clip_skip: int) -> Conditioning:
        read = [encoder.read(prompt, clip_skip) for encoder in self._encoders]
        tensors = {TEXT: torch.cat([states for states, _ in read], dim=-1)}
        if (pooled := read[-1][1]) is not None:
            tensors[POOLED] = pooled
        return Conditioning(tensors)


def _weighted(states: Tensor, empty: Tensor, read: list[Block]) -> Tensor:
    """Tokens of weight 1 keep their bits."""
    weights = torch.tensor([block.weights for block in read], device=states.device).unsqueeze(-1)
    return torch.where(weights == 1, states, (states - empty) * weights + empty)
