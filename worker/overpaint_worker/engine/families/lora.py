"""LoRA files: small changes to a model's weights, `W + weight * scale * up @ down`.

Two ways of naming layers are read: diffusers' and PEFT's (`unet.down_blocks.0...to_q.lora_A.weight`) and
kohya's (`lora_unet_down_blocks_0_..._to_q.lora_down.weight`, and with original checkpoints' block names
`lora_unet_input_blocks_1_1_...`). Layers are told apart by diffusers' names with `_` for every dot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from overpaint_shared.catalogue import ModelTraits
from overpaint_shared.errors import ModelLoadError
from overpaint_worker.engine.families.weights import (
    HashCache,
    checked_digest,
    locate,
    part_files,
    read_header,
)
from overpaint_worker.registry import LoraEntry

STEM: Final = "pytorch_lora_weights"
"""What diffusers calls the file in a LoRA's folder."""

Layer = tuple[str, str]
"""A network (`unet`, `text_encoder`, `text_encoder_2`) and a layer of it, dots and all as `_`."""

_NETWORKS: Final = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder_2.": "text_encoder_2",
}
_NAME: Final = re.compile(
    r"(?P<layer>.+?)(?:\.lora|\.lora_linear_layer|_lora)?"
    r"\.(?P<role>lora_A|lora_B|lora_down|lora_up|down|up|alpha)(?:\.default)?(?:\.weight)?"
)
_LAYERS_PER_BLOCK: Final = 2
_BLOCK: Final = re.compile(r"(?P<side>input|output)_blocks_(?P<n>\d+)_(?P<part>\d)_(?P<rest>.+)")
_MIDDLE: Final = re.compile(r"middle_block_(?P<part>[012])_(?P<rest>.+)")
_IN_MIDDLE: Final = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}
_IN_RESNET: Final = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SAMPLERS: Final = {"op": "downsamplers_0_conv", "conv": "upsamplers_0_conv"}
"""How original checkpoints number a UNet's blocks and call its layers; kohya's LoRAs for SDXL do so too."""
_ROLES: Final = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
_TEXT: Final = re.compile(r"attn2_to_k$")


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What a LoRA does to one layer."""

    down: Tensor
    """[r, inputs] or, of a convolution, [r, inputs, k, k]."""
    up: Tensor
    """[outputs, r], or [outputs, r, 1, 1]."""
    scale: float
    """alpha / r."""

    def of(self, weight: Tensor) -> Tensor:
        """`scale * up @ down` in float32, in the shape and on the device of `weight`.

        Raises `ValueError`: it is for weights of another shape.
        """
        down, up = (part.to(weight.device, torch.float32).flatten(1) for part in (self.down, self.up))
        if up.shape[1] != down.shape[0] or up.shape[0] * down.shape[1] != weight.numel():
            raise ValueError(f"{tuple(self.up.shape)} x {tuple(self.down.shape)} on {tuple(weight.shape)}")
        return (up @ down).reshape(weight.shape) * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A LoRA's changes, on the CPU."""

    entry: LoraEntry
    sha256: str
    changes: Mapping[Layer, Change]


def inspect_lora(entry: LoraEntry, hashes: HashCache) -> ModelTraits:
    """What a LoRA is, by its header: the width of the text that its model reads, where it touches that.

    Raises `ModelLoadError`: it is missing, damaged, a pickle, or of a kind that is not rendered.
    """
    files = _files(entry)
    (path,) = files.values()
    header = read_header(path, entry)
    shapes = {
        layer: header.tensors[name].shape
        for name, (layer, role) in _named(entry, header.tensors).items()
        if role == "down" and layer[0] == "unet" and _TEXT.search(layer[1])
    }
    widths = {shape[1] for shape in shapes.values() if len(shape) > 1}
    return ModelTraits(
        name=entry.name, kind="lora", sha256=checked_digest(hashes, entry, files, single=True),
        context_width=widths.pop() if len(widths) == 1 else None,
    )  # fmt: skip


def read_lora(entry: LoraEntry, hashes: HashCache) -> Lora:
    """Read a LoRA onto the CPU. Raises `ModelLoadError`, as `inspect_lora`."""
    from safetensors.torch import load_file

    files = _files(entry)
    (path,) = files.values()
    header = read_header(path, entry)
    names = _named(entry, header.tensors)
    alphas = _Alphas(entry, header.metadata)
    tensors = load_file(path)
    parts: dict[Layer, dict[str, Tensor]] = {}
    for name, (layer, role) in names.items():
        parts.setdefault(layer, {})[role] = tensors[name]
    changes = {layer: _change(entry, layer, part, alphas) for layer, part in parts.items()}
    return Lora(entry, checked_digest(hashes, entry, files, single=True), changes)


def _files(entry: LoraEntry) -> dict[str, Path]:
    root = locate(entry)
    path = root if root.is_file() else part_files(root, STEM, entry).files[0]
    return {path.name: path}


def _named(entry: LoraEntry, names: Mapping[str, object]) -> dict[str, tuple[Layer, str]]:
    """For each tensor its layer, and whether it is `down`, `up` or `alpha`."""
    found = {name: _parsed(name) for name in names}
    if strange := sorted(name for name, parsed in found.items() if parsed is None):
        raise _error(
            entry, f"it holds what is no plain LoRA: {strange[0]}", "use a LoRA of up and down weights"
        )
    if not found:
        raise _error(entry, "it is empty", "fetch it again")
    return {name: parsed for name, parsed in found.items() if parsed is not None}


def _parsed(name: str) -> tuple[Layer, str] | None:
    bare = name.removeprefix("base_model.model.")
    network, rest = _network(bare)
    # Older files of diffusers name the attention's processor between the layer and its change
    match = _NAME.fullmatch(rest.replace(".processor.", "."))
    if match is None:
        return None
    layer = match["layer"].replace(".", "_")
    if layer.endswith("to_out"):
        layer += "_0"
    layer = _as_diffusers(layer) if network == "unet" else layer.removeprefix("text_model_")
    return (network, layer), _ROLES.get(match["role"], match["role"])


def _as_diffusers(layer: str) -> str:
    """A UNet's layer by diffusers' name, where it has the name that original checkpoints give it."""
    if middle := _MIDDLE.fullmatch(layer):
        return f"mid_block_{_IN_MIDDLE[middle['part']]}_{_IN_RESNET.get(middle['rest'], middle['rest'])}"
    match = _BLOCK.fullmatch(layer)
    if match is None:
        return layer
    side, rest = match["side"], match["rest"]
    block, place = divmod(int(match["n"]) - (side == "input"), _LAYERS_PER_BLOCK + 1)
    where = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
    if rest in _SAMPLERS:
        return f"{where}_{_SAMPLERS[rest]}"
    kind = "resnets" if match["part"] == "0" else "attentions"
    return f"{where}_{kind}_{place}_{_IN_RESNET.get(rest, rest)}"


def _network(name: str) -> tuple[str, str]:
    """The network, and what follows; names that begin with no network's are of the denoiser."""
    for prefix, network in _NETWORKS.items():
        if name.startswith(prefix):
            return network, name.removeprefix(prefix)
    return "unet", name


def _change(entry: LoraEntry, layer: Layer, part: Mapping[str, Tensor], alphas: _Alphas) -> Change:
    if not {"down", "up"} <= part.keys():
        raise _error(entry, f"of {'.'.join(layer)} it holds only {', '.join(sorted(part))}", "fetch it again")
    rank = part["down"].shape[0]
    alpha = float(part["alpha"]) if "alpha" in part else alphas.of(layer, rank)
    return Change(part["down"], part["up"], alpha / rank)


class _Alphas:
    """PEFT keeps a LoRA's alpha in the file's metadata; where there is none it is the rank."""

    def __init__(self, entry: LoraEntry, metadata: Mapping[str, str]) -> None:
        try:
            told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except ValueError as cause:
            raise _error(entry, "its lora_adapter_metadata is no JSON", "fetch it again") from cause
        self._told: Mapping[str, Any] = told if isinstance(told, dict) else {}
        for option in ("use_dora", "use_rslora"):
            if any(value for key, value in self._told.items() if key.endswith(option)):
                raise _error(entry, f"it was made with {option}", "use a plain LoRA")

    def of(self, layer: Layer, rank: int) -> float:
        """Alpha of a layer of that rank."""
        network, name = layer
        for pattern, alpha in self._patterns(network):
            if name.endswith(pattern.replace(".", "_")):
                return float(alpha)
        return float(self._told.get(f"{network}.lora_alpha", rank))

    def _patterns(self, network: str) -> Iterator[tuple[str, Any]]:
        patterns = self._told.get(f"{network}.alpha_pattern") or {}
        yield from patterns.items() if isinstance(patterns, dict) else ()


def _error(entry: LoraEntry, message: str, fix: str) -> ModelLoadError:
    return ModelLoadError(f"{entry.name}: {message}", field=entry.field("path"), value=entry.path, fix=fix)
