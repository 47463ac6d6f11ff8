"""VAEs of their own, that a job may use instead of its model's: diffusers folders and single files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from overpaint_shared.errors import ModelLoadError
from overpaint_worker.engine.families.loading import place, quiet
from overpaint_worker.engine.families.survey import named_config
from overpaint_worker.engine.families.vae import Tiling, Vae
from overpaint_worker.engine.families.weights import locate, part_files, read_header, read_json
from overpaint_worker.registry import VaeEntry

STEM: Final = "diffusion_pytorch_model"
_ENTRANCE: Final = "encoder.conv_in.weight"
"""A layer that every such VAE has, in both layouts; behind a prefix where a whole checkpoint is named."""


@dataclass(frozen=True, slots=True)
class VaeFiles:
    """Where a VAE's weights are and what describes them."""

    entry: VaeEntry
    root: Path
    files: Mapping[str, Path]
    variant: str | None
    config: Path | None
    """Of a single file: the folder of configurations that it is read as."""

    @property
    def single(self) -> bool:
        """Whether it is one file."""
        return self.config is not None


def survey_vae(entry: VaeEntry, shipped: str) -> VaeFiles:
    """Read the headers; `shipped` is what single files are read as unless their entry says otherwise.

    Raises `ModelLoadError`: missing, damaged, a pickle, or no VAE.
    """
    root = locate(entry)
    if root.is_file():
        found = VaeFiles(entry, root, {root.name: root}, None, named_config(entry, shipped))
    else:
        part = part_files(root, STEM, entry)
        found = VaeFiles(entry, root, {path.name: path for path in part.files}, part.variant, None)
    names = {name for path in found.files.values() for name in read_header(path, entry).tensors}
    if not any(name.endswith(_ENTRANCE) for name in names):
        raise _error(entry, "it is no VAE: it has no encoder", "name a VAE's weights")
    return found


def load_vae(found: VaeFiles, device: torch.device, dtype: torch.dtype, tiling: Tiling | None = None) -> Vae:
    """Read the weights onto `device`. Raises `ModelLoadError`: they do not fit their configuration."""
    try:
        with quiet():
            network = _read(found, dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as cause:
        message = f"the weights do not fit their configuration: {cause}"
        raise _error(found.entry, message, "check `config`, or fetch the VAE again") from cause
    if missing := [name for name, tensor in network.named_parameters() if tensor.is_meta]:
        raise _error(found.entry, f"weights are missing: {missing[0]}", "fetch the VAE again")
    network.requires_grad_(requires_grad=False).eval()
    place(network, device)
    return Vae(network, device, tiling)


def overflows(found: VaeFiles) -> bool:
    """Whether its configuration says that it overflows in half precision. Raises `ModelLoadError`."""
    path = found.root / "config.json" if found.config is None else found.config / "vae" / "config.json"
    return bool(read_json(path, found.entry).get("force_upcast", True))


def _read(found: VaeFiles, dtype: torch.dtype) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from safetensors.torch import load_file

    kind: Any = AutoencoderKL
    if found.config is not None:
        return kind.from_single_file(
            load_file(found.root), config=str(found.config), subfolder="vae", local_files_only=True,
            torch_dtype=dtype,
        )  # fmt: skip
    network, info = kind.from_pretrained(
        str(found.root), variant=found.variant, use_safetensors=True, local_files_only=True,
        output_loading_info=True, torch_dtype=dtype,
    )  # fmt: skip
    if missing := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"weights are missing: {missing[0]}")
    return network


def _error(entry: VaeEntry, message: str, fix: str) -> ModelLoadError:
    return ModelLoadError(f"{entry.name}: {message}", field=entry.field("path"), value=entry.path, fix=fix)
