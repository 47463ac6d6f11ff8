"""Overlays: weights with LoRAs in them, laid over a model's own and taken off again.

A layer's changed weight is computed once, from the model's own, and then the layer is handed one or the
other. The model's own weights are never written to, so that without LoRAs it has its bits back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import Conv2d, Linear, Module, Parameter

from overpaint_shared.errors import JobError
from overpaint_worker.engine.families.lora import Change, Layer, Lora

Uses = Sequence[tuple[Lora, float]]
"""LoRAs with the weights that a job gives them."""


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """One layer's two weights."""

    module: Module
    own: Parameter
    changed: Parameter


Overlay = tuple[Patch, ...]
BARE: Overlay = ()
"""Nothing laid over."""


class Networks:
    """The networks of one model, and what lies over their weights now. For one thread."""

    def __init__(self, networks: Mapping[str, Module], rounded: Mapping[str, torch.dtype]) -> None:
        """`rounded`: networks whose weights hold only what another dtype can."""
        self._rounded = rounded
        self._on: Overlay = BARE
        self._layers: dict[Layer, Module] = {
            (network, name.replace(".", "_").removeprefix("text_model_")): layer
            for network, module in networks.items()
            for name, layer in module.named_modules()
            if isinstance(layer, Linear | Conv2d)
        }

    def use(self, overlay: Overlay) -> None:
        """Lay this over the networks' own weights, and nothing else."""
        if overlay is self._on:
            return
        for patch in self._on:
            patch.module.weight = patch.own
        for patch in overlay:
            patch.module.weight = patch.changed
        self._on = overlay

    def overlay(self, uses: Uses) -> Overlay:
        """What these LoRAs make of the networks' own weights, summed in float32 in their order.

        Raises `JobError`: a LoRA was made for another architecture.
        """
        self.use(BARE)
        together: dict[Layer, list[tuple[Lora, Change, float]]] = {}
        for lora, weight in uses:
            for layer, change in lora.changes.items():
                together.setdefault(layer, []).append((lora, change, weight))
        return tuple(self._patch(layer, changes) for layer, changes in together.items())

    def _patch(self, layer: Layer, changes: Sequence[tuple[Lora, Change, float]]) -> Patch:
        module = self._layers.get(layer)
        if module is None:
            raise _misfit(changes[0][0], f"the model has no layer {'.'.join(layer)}")
        own = module.weight
        if not isinstance(own, Parameter):
            raise TypeError(f"{'.'.join(layer)} has no weight")
        total = own.detach().to(torch.float32)
        for lora, change, weight in changes:
            try:
                total = total + change.of(own) * weight
            except ValueError as cause:
                raise _misfit(lora, f"its {'.'.join(layer)} has another shape: {cause}") from cause
        kept = total.to(self._rounded.get(layer[0], own.dtype)).to(own.dtype)
        return Patch(module, own, Parameter(kept, requires_grad=False))


def _misfit(lora: Lora, why: str) -> JobError:
    name = lora.entry.name
    return JobError(
        f"the LoRA {name!r} was made for another model: {why}",
        field="loras", value=name, fix="use a LoRA of the model's own architecture",
    )  # fmt: skip
