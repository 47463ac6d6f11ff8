"""Reading a checkpoint's parts, from a diffusers folder or a single file. Never asks a hub.

Both layouts go through the libraries' own loaders; what they would let pass with a warning (weights that are
missing or of another shape) is an error here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import Module

from overpaint_shared.errors import ModelLoadError
from overpaint_shared.spec.fields import nearest
from overpaint_worker.engine.families.weights import Header, locate, part_files, read_header, read_json
from overpaint_worker.registry import ControlnetEntry, Entry, ModelEntry, Prediction, VaeEntry

Configured = ModelEntry | ControlnetEntry | VaeEntry
"""Entries that may name a configuration."""

CONFIGS: Final = Path(__file__).parent / "configs"
"""Architectures that single files are read as, shipped with the worker."""

STEMS: Final = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""A diffusers folder's parts and what their weight files are called."""

_TELLING: Final = {"text_encoder_2", "text_encoder_3", "transformer"}
"""Parts that tell families apart."""
_FOLDER_INPUT: Final = "conv_in.weight"
_SINGLE_INPUT: Final = "model.diffusion_model.input_blocks.0.0.weight"
_V_MARK: Final = "v_pred"
_ZERO_TERMINAL_MARK: Final = "ztsnr"
"""Tensors that say by their names alone how a single file was trained."""
_PREDICTIONS: Final[dict[str, Prediction]] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v_prediction": "v",
    "v": "v",
}


Guess = Callable[[ModelEntry, int, Prediction | None], str | None]
"""The shipped configuration of a single file: by its entry, the width of its text, and what it says that it
predicts. None: none fits. Raises `ModelLoadError`: the shapes alone do not tell."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the checkpoints of a family are laid out."""

    title: str
    """For messages."""
    prefixes: Mapping[str, str]
    """The parts, and how the names of their tensors begin in a single file."""
    folder_context: str
    """A weight of cross-attention, whose second dimension is the width of the text; in a folder's UNet."""
    single_context: str
    """The same in a single file."""
    guess: Guess
    careful_vae: bool = False
    """Its VAE overflows in float16, so there it computes in float32, unless `force_upcast` is off."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What headers and configurations tell of a checkpoint."""

    entry: ModelEntry
    layout: Layout
    root: Path
    """The diffusers folder, or the single file."""
    config: Path
    """The folder of JSON configurations: the diffusers folder itself, or what a single file is read as."""
    files: Mapping[str, Path]
    """Every weight file, by its name relative to the model."""
    variants: Mapping[str, str | None]
    """For each part of a folder, the variant of its weight files."""
    in_channels: int
    context_width: int
    """Width of the text features that cross-attention reads."""
    prediction: Prediction
    scheduler: Mapping[str, Any]

    @property
    def single(self) -> bool:
        """Whether it is one file."""
        return self.root.is_file()


@dataclass(frozen=True, slots=True)
class Parts:
    """A checkpoint's networks, in evaluation mode and without gradients."""

    unet: Module
    """`UNet2DConditionModel`"""
    vae: Module
    """`AutoencoderKL`"""
    text_encoder: Module
    """`CLIPTextModel`"""
    text_encoder_2: Module | None = None
    """`CLIPTextModelWithProjection`"""

    @property
    def text_encoders(self) -> list[Module]:
        """In the order in which their states are joined."""
        return [each for each in (self.text_encoder, self.text_encoder_2) if each is not None]


def survey(entry: ModelEntry, layout: Layout) -> Checkpoint:
    """Read the headers and configurations.

    Raises `ModelLoadError`: something is missing, damaged, a pickle, or of another family.
    """
    root = locate(entry)
    return (_survey_file if root.is_file() else _survey_folder)(entry, layout, root)


def _survey_folder(entry: ModelEntry, layout: Layout, root: Path) -> Checkpoint:
    if any((root / part).exists() != (part in layout.prefixes) for part in _TELLING):
        raise _error(entry, f"this is no {layout.title} model", "name its own family", "family")
    found = {part: part_files(root, part, STEMS[part], entry) for part in layout.prefixes}
    headers = {path: read_header(path, entry) for files in found.values() for path in files.files}
    unet = [headers[path] for path in found["unet"].files]
    scheduler = read_json(root / "scheduler" / "scheduler_config.json", entry)
    return Checkpoint(
        entry=entry,
        layout=layout,
        root=root,
        config=root,
        files={path.relative_to(root).as_posix(): path for path in headers},
        variants={part: files.variant for part, files in found.items()},
        in_channels=_width(entry, unet, _FOLDER_INPUT),
        context_width=_width(entry, unet, layout.folder_context),
        prediction=_prediction(entry, scheduler),
        scheduler=scheduler,
    )


def _width(entry: ModelEntry, headers: Iterable[Header], name: str) -> int:
    """What a layer takes in: the second number of its weight's shape."""
    for header in headers:
        if name in header.tensors and len(header.tensors[name].shape) > 1:
            return header.tensors[name].shape[1]
    raise _error(entry, f"its UNet has no {name}", "name its own family, or fetch the model again")


def _survey_file(entry: ModelEntry, layout: Layout, path: Path) -> Checkpoint:
    header = read_header(path, entry)
    for part, prefix in layout.prefixes.items():
        if not any(name.startswith(prefix) for name in header.tensors):
            fix = "use a whole checkpoint, or name its own family"
            raise _error(entry, f"{path.name} holds no {part} of {layout.title}", fix)
    config = config_folder(entry, layout, header)
    scheduler = read_json(config / "scheduler" / "scheduler_config.json", entry)
    if _ZERO_TERMINAL_MARK in header.tensors:
        scheduler["rescale_betas_zero_snr"] = True
    return Checkpoint(
        entry=entry,
        layout=layout,
        root=path,
        config=config,
        files={path.name: path},
        variants={},
        in_channels=_width(entry, [header], _SINGLE_INPUT),
        context_width=_width(entry, [header], layout.single_context),
        prediction=_prediction(entry, scheduler, _told(header)),
        scheduler=scheduler,
    )


def config_folder(entry: ModelEntry, layout: Layout, header: Header) -> Path:
    """The JSON configurations that a single file is read as: a shipped one by name, or a folder.

    Raises `ModelLoadError`: there is no such configuration, or none is named and the shapes fit none.
    """
    if entry.config is not None:
        return named_config(entry, None)
    width = _width(entry, [header], layout.single_context)
    return named_config(entry, layout.guess(entry, width, _told(header)))


def named_config(entry: Configured, guess: str | None) -> Path:
    """The folder that `config` names; where it names none, the shipped one called `guess`.

    Raises `ModelLoadError`: there is none of that name, or neither a name nor a guess.
    """
    shipped = {path.name: path for path in sorted(CONFIGS.iterdir()) if path.is_dir()}
    if entry.config is None:
        if guess in shipped:
            return shipped[guess]
        message = "its shapes fit no shipped configuration"
        raise _error(entry, message, "name a folder of JSON by `config`", "config")
    folder = entry.base / Path(entry.config).expanduser()
    if entry.config not in shipped and not folder.is_dir():
        close = nearest(entry.config, shipped)
        hint = f"did you mean {close!r}? " if close else ""
        fix = f"{hint}use one of {', '.join(shipped)}, or a folder with unet, vae, text_encoder and scheduler"
        raise _error(entry, f"there is no configuration {entry.config!r}", fix, "config")
    return shipped.get(entry.config, folder)


def _told(header: Header) -> Prediction | None:
    """What a single file says that it predicts: in its metadata or, as SDXL files do, by an empty tensor."""
    said = _PREDICTIONS.get(header.metadata.get("modelspec.prediction_type", ""))
    return said or ("v" if _V_MARK in header.tensors else None)


def _prediction(
    entry: ModelEntry, scheduler: Mapping[str, Any], told: Prediction | None = None
) -> Prediction:
    """The registry's word, else the file's own, else the configuration's."""
    said = entry.prediction or told
    if said is not None:
        return said
    name = str(scheduler.get("prediction_type", "epsilon"))
    if name not in _PREDICTIONS:
        raise _error(
            entry, f"it predicts {name!r}", "only epsilon and v models can be rendered", "prediction"
        )
    return _PREDICTIONS[name]


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


def _refuse(entry: Entry, part: str, missing: list[str]) -> None:
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
    kinds = _kinds()

    def load(part: str, **dtype_option: torch.dtype) -> Any:
        network, info = kinds[part].from_pretrained(
            str(found.root), subfolder=part, variant=found.variants[part], use_safetensors=True,
            local_files_only=True, output_loading_info=True, **dtype_option,
        )  # fmt: skip
        _refuse(found.entry, part, sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])))
        return network

    return Parts(
        unet=load("unet", torch_dtype=dtype),
        vae=load("vae", torch_dtype=_vae_dtype(found, dtype)),
        **{part: load(part, dtype=torch.float32) for part in _text_parts(found)},
    )


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

    return Parts(
        unet=load("unet", dtype, in_channels=found.in_channels),
        vae=load("vae", _vae_dtype(found, dtype)),
        **{part: load_text(part) for part in _text_parts(found)},
    )


def _text_parts(found: Checkpoint) -> list[str]:
    return [part for part in found.layout.prefixes if part.startswith("text_encoder")]


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


def _error(entry: Entry, message: str, fix: str, key: str = "path") -> ModelLoadError:
    value = getattr(entry, key)
    return ModelLoadError(f"{entry.name}: {message}", field=entry.field(key), value=value, fix=fix)
