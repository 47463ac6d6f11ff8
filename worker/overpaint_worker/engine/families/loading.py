"""Reading a checkpoint's networks. Never asks a hub.

Both layouts go through the libraries' own loaders; what they would let pass with a warning (weights that are
missing or of another shape) is an error here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module

from overpaint_shared.errors import ModelLoadError
from overpaint_worker.engine.families.survey import Checkpoint
from overpaint_worker.engine.families.vocabulary import Vocabulary
from overpaint_worker.engine.families.weights import read_json
from overpaint_worker.registry import ModelEntry


@dataclass(frozen=True, slots=True)
class Parts:
    """A checkpoint's networks, in evaluation mode and without gradients."""

    unet: Module
    """`UNet2DConditionModel`"""
    vae: Module
    """`AutoencoderKL`"""
    text_encoder: Module
    """`CLIPTextModel`"""
    vocabularies: tuple[Vocabulary, ...]
    """Of the text encoders, in order."""
    text_encoder_2: Module | None = None
    """`CLIPTextModelWithProjection`"""

    @property
    def text_encoders(self) -> list[Module]:
        """In the order in which their states are joined."""
        return [each for each in (self.text_encoder, self.text_encoder_2) if each is not None]


def read_parts(found: Checkpoint, dtype: torch.dtype) -> Parts:
    """Load the networks on the CPU: UNet and VAE in `dtype`, the text encoders in float32.

    Raises `ModelLoadError`: weights are missing, or do not fit the configuration.
    """
    try:
        with quiet():
            parts = _from_file(found, dtype) if found.single else _from_folder(found, dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as cause:
        message = f"the weights do not fit their configuration: {cause}"
        raise _error(found.entry, message, "check `config`, or fetch the model again") from cause
    for name in found.layout.prefixes:
        network: Module = getattr(parts, name)
        missing = [key for key, tensor in network.named_parameters() if tensor.is_meta]
        _refuse(found.entry, name, missing)
        network.requires_grad_(requires_grad=False).eval()
    return parts


def _refuse(entry: ModelEntry, part: str, missing: list[str]) -> None:
    if missing:
        names = f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else missing[0]
        raise _error(entry, f"weights of the {part} are missing: {names}", "fetch the model again")


def _vae_dtype(found: Checkpoint, dtype: torch.dtype) -> torch.dtype:
    if dtype != torch.float16 or not found.layout.careful_vae:
        return dtype
    config = read_json(found.config / "vae" / "config.json", found.entry)
    return torch.float32 if config.get("force_upcast", True) else dtype


def _kinds() -> dict[str, Any]:
    """The class of each part."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    return {
        "unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }  # fmt: skip


def _from_folder(found: Checkpoint, dtype: torch.dtype) -> Parts:
    return Parts(
        unet=_load(found, "unet", torch_dtype=dtype),
        vae=_load(found, "vae", torch_dtype=_vae_dtype(found, dtype)),
        vocabularies=tuple(found.vocabularies.values()),
        **{part: _load(found, part, dtype=torch.float32) for part in found.vocabularies},
    )


def _load(found: Checkpoint, part: str, **dtype_option: torch.dtype) -> Any:
    """One part, from a folder of its own."""
    files = found.folders[part]
    network, info = _kinds()[part].from_pretrained(
        str(files.folder), variant=files.variant, use_safetensors=True, local_files_only=True,
        output_loading_info=True, **dtype_option,
    )  # fmt: skip
    _refuse(found.entry, part, sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])))
    return network


def _from_file(found: Checkpoint, dtype: torch.dtype) -> Parts:
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from safetensors.torch import load_file

    kinds, tensors, config = _kinds(), load_file(found.root), str(found.config)

    def load(part: str, dtype: torch.dtype, **more: Any) -> Any:
        return kinds[part].from_single_file(
            dict(tensors), config=config, subfolder=part, local_files_only=True, torch_dtype=dtype, **more
        )

    def load_text(part: str) -> Any:
        return create_diffusers_clip_model_from_ldm(  # type: ignore[no-untyped-call]
            kinds[part], dict(tensors), subfolder=part, config=config, torch_dtype=torch.float32,
            local_files_only=True,
        )  # fmt: skip

    if "unet" in found.folders:
        unet = _load(found, "unet", torch_dtype=dtype)
    else:
        unet = load("unet", dtype, in_channels=found.in_channels)
    return Parts(
        unet=unet,
        vae=load("vae", _vae_dtype(found, dtype)),
        vocabularies=tuple(found.vocabularies.values()),
        **{part: load_text(part) for part in found.vocabularies},
    )


def place(network: Module, device: torch.device) -> None:
    """Move the weights, on a CPU too: out of the mapped file and into memory of their own.

    In the file they lie at odd addresses, where some kernels sum in another order, so that the same weights
    from another layout would give other bits. Nor may a file that is replaced pull them away.
    """
    if device.type != "cpu":
        network.to(device)
        return
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loaders' progress bars, and without their reports of weights that they have no use for."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _error(entry: ModelEntry, message: str, fix: str) -> ModelLoadError:
    return ModelLoadError(f"{entry.name}: {message}", field=entry.field("path"), value=entry.path, fix=fix)
