"""ControlNets of the Stable Diffusion families, from diffusers folders and single files. Never asks a hub."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module

from overpaint_shared.errors import ModelLoadError
from overpaint_worker.engine.families import Residuals
from overpaint_worker.engine.families.conditioning import network_options
from overpaint_worker.engine.families.loading import place, quiet
from overpaint_worker.engine.families.survey import named_config
from overpaint_worker.engine.families.weights import Header, locate, part_files, read_header, read_json
from overpaint_worker.registry import ControlnetEntry

STEM: Final = "diffusion_pytorch_model"
HINT_CHANNELS: Final = 3

_PREFIX: Final = "control_model."
_HINT: Final = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")
"""The layer that reads the hint: as diffusers calls it, and as original files do."""
_CONTEXT: Final = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",  # SDXL attends from level 1 on
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
)
_SIZES: Final = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
"""The layers that read pooled text and sizes: as original files call them, and as diffusers does."""
_WIDTHS: Final = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""Shipped configurations by the width of the text that cross-attention reads."""


class ControlNet:
    """One ControlNet on one device. For the thread that runs the step loop.

    `pooled`: each residual is replaced by its mean over the picture, as "shuffle" nets want it.
    """

    def __init__(self, name: str, net: Module, *, pooled: bool = False) -> None:
        self.name = name
        self.pooled = pooled
        self._net: Any = net

    def residuals(
        self, seen: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], hints: Tensor
    ) -> Residuals:
        """What it adds at strength 1.

        `seen` [R, C, h, w] is what the denoiser sees, `timestep` [R] int64, `conditioning` the rows' tensors,
        `hints` [R, 3, 8 h, 8 w] as they are.
        """
        dtype = self._net.dtype
        down, mid = self._net(
            seen.to(dtype).contiguous(),
            timestep.to(self._net.device),
            controlnet_cond=hints.to(self._net.device, dtype),
            return_dict=False,
            **network_options(conditioning, seen, dtype),
        )
        return Residuals(tuple(map(self._pool, down)), self._pool(mid))

    def _pool(self, residual: Tensor) -> Tensor:
        if not self.pooled:
            return residual
        return residual.mean(dim=(2, 3), keepdim=True).expand_as(residual).contiguous()


@dataclass(frozen=True, slots=True)
class ControlnetFiles:
    """What headers and configurations tell of a ControlNet."""

    entry: ControlnetEntry
    files: Mapping[str, Path]
    """Every weight file, by its name relative to the net."""
    single: bool
    context_width: int
    config: Mapping[str, Any]
    """diffusers' configuration of the network."""
    pooled: bool


def survey_controlnet(entry: ControlnetEntry) -> ControlnetFiles:
    """Read the headers and the configuration. Raises `ModelLoadError`: missing, damaged, or no ControlNet."""
    root = locate(entry)
    if root.is_file():
        header = read_header(root, entry)
        width = _context_width(entry, [header])
        pooled = root.stem.removesuffix("_fp16").endswith("_shuffle")
        return ControlnetFiles(entry, {root.name: root}, True, width, _shipped(entry, width), pooled)
    paths = part_files(root, STEM, entry).files
    width = _context_width(entry, [read_header(path, entry) for path in paths])
    config = read_json(root / "config.json", entry)
    pooled = bool(config.get("global_pool_conditions", False))
    return ControlnetFiles(entry, {path.name: path for path in paths}, False, width, config, pooled)


def _context_width(entry: ControlnetEntry, headers: list[Header]) -> int:
    shapes = {
        name.removeprefix(_PREFIX): info.shape for header in headers for name, info in header.tensors.items()
    }
    if not any(name in shapes for name in _HINT):
        raise _error(entry, "it is no ControlNet: nothing in it reads a hint", "name a ControlNet's weights")
    hint = next(shapes[name] for name in _HINT if name in shapes)
    if len(hint) != 4 or hint[1] != HINT_CHANNELS:
        raise _error(entry, f"its hint has the shape {hint}", "only hints of 3 channels can be rendered")
    for name in _CONTEXT:
        if len(shapes.get(name, ())) > 1:
            return shapes[name][1]
    raise _error(entry, "it is no ControlNet of a Stable Diffusion", "name its own family", "family")


def _shipped(entry: ControlnetEntry, width: int) -> dict[str, Any]:
    """A ControlNet is a copy of a UNet's first half, so the UNet's configuration describes it."""
    from diffusers.models.controlnets.controlnet import ControlNetModel

    folder = named_config(entry, _WIDTHS.get(width))
    unet = read_json(folder / "unet" / "config.json", entry)
    known = inspect.signature(ControlNetModel.__init__).parameters.keys() - {"self"}
    return {key: value for key, value in unet.items() if key in known} | {"in_channels": 4}


def load_controlnet(found: ControlnetFiles, device: torch.device, dtype: torch.dtype) -> ControlNet:
    """Read the weights onto `device`. Raises `ModelLoadError`: they do not fit their configuration."""
    from diffusers.models.controlnets.controlnet import ControlNetModel
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in found.files.values():
        tensors |= load_file(path)
    try:
        with quiet():
            net = ControlNetModel.from_config({**found.config, "global_pool_conditions": False})
            if found.single:
                tensors = _converted(tensors, net.config)
            net.load_state_dict(tensors)
            net.requires_grad_(requires_grad=False).eval().to(dtype)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as cause:
        message = f"the weights do not fit their configuration: {cause}"
        raise _error(found.entry, message, "check `config`, or fetch the net again") from cause
    place(net, device)
    return ControlNet(found.entry.name, net, pooled=found.pooled)


def _converted(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A single file's tensors by diffusers' names; those of a file that has them already as they are."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    found: dict[str, Tensor] = convert_controlnet_checkpoint(dict(tensors), config)  # type: ignore[no-untyped-call]
    for name, tensor in tensors.items():
        head, dot, kind = name.removeprefix(_PREFIX).rpartition(".")
        if head in _SIZES:  # diffusers' converter leaves out what only SDXL has
            found[_SIZES[head] + dot + kind] = tensor
    return found


def _error(entry: ControlnetEntry, message: str, fix: str, key: str = "path") -> ModelLoadError:
    value = getattr(entry, key)
    return ModelLoadError(f"{entry.name}: {message}", field=entry.field(key), value=value, fix=fix)
