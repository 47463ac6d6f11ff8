"""What a checkpoint is, told by headers and configurations: a diffusers folder, or a single file.

Reads no tensor, imports no torch, never asks a hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from overpaint_shared.errors import ModelLoadError
from overpaint_shared.spec.fields import nearest
from overpaint_worker.engine.families.vocabulary import Vocabulary, vocabulary_of
from overpaint_worker.engine.families.weights import (
    Header,
    PartFiles,
    locate,
    part_files,
    read_header,
    read_json,
)
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
_CLIP_WIDTH: Final = 512
"""Of a text encoder whose configuration does not say: transformers' own default."""
_FOLDER_INPUT: Final = "conv_in.weight"
_FOLDER_CONTEXT: Final = ".attn2.to_k.weight"
"""How the weights end that read the text: which of a UNet's levels do so is its own affair."""
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
    single_context: str
    """A weight of cross-attention, whose second dimension is the width of the text; in a single file."""
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
    """Every weight file that is read, and each tokenizer of the folder's own, by its name in the model."""
    folders: Mapping[str, PartFiles]
    """The parts that are read from folders of their own."""
    in_channels: int
    context_width: int
    """Width of the text features that cross-attention reads."""
    prediction: Prediction
    scheduler: Mapping[str, Any]
    vocabularies: Mapping[str, Vocabulary]
    """Of each text encoder."""

    @property
    def single(self) -> bool:
        """Whether it is one file."""
        return self.root.is_file()


def survey(entry: ModelEntry, layout: Layout) -> Checkpoint:
    """Read the headers and configurations.

    Raises `ModelLoadError`: something is missing, damaged, a pickle, or of another family.
    """
    root = locate(entry)
    found = (_survey_file if root.is_file() else _survey_folder)(entry, layout, root)
    if entry.unet is not None:
        _check_text_width(found)
    return found


def _check_text_width(found: Checkpoint) -> None:
    """Whether a UNet from elsewhere reads what the checkpoint's text encoders say."""
    texts = (read_json(found.config / part / "config.json", found.entry) for part in found.vocabularies)
    widths = [text.get("hidden_size", _CLIP_WIDTH) for text in texts]
    given = sum(width for width in widths if isinstance(width, int))
    if given != found.context_width:
        raise _error(
            found.entry, f"it reads text of width {found.context_width}, and the model's is {given} wide",
            "name a UNet of the same architecture", "unet",
        )  # fmt: skip


def _survey_folder(entry: ModelEntry, layout: Layout, root: Path) -> Checkpoint:
    if any((root / part).exists() != (part in layout.prefixes) for part in _TELLING):
        raise _error(entry, f"this is no {layout.title} model", "name its own family", "family")
    folders = {part: _part_files(entry, root, part) for part in layout.prefixes}
    headers = {part: _headers(entry, part, files) for part, files in folders.items()}
    scheduler = read_json(root / "scheduler" / "scheduler_config.json", entry)
    vocabularies = _vocabularies(entry, layout, root)
    tokenizers = [each.file for each in vocabularies.values() if each.file]
    return Checkpoint(
        entry=entry,
        layout=layout,
        root=root,
        config=root,
        files=_named(folders) | {path.relative_to(root).as_posix(): path for path in tokenizers},
        folders=folders,
        in_channels=_width(entry, headers["unet"], _FOLDER_INPUT),
        context_width=_width(entry, headers["unet"], _FOLDER_CONTEXT),
        prediction=_prediction(entry, scheduler),
        scheduler=scheduler,
        vocabularies=vocabularies,
    )


def _part_files(entry: ModelEntry, root: Path, part: str) -> PartFiles:
    """The files of one part: in the checkpoint's own folder, or for a UNet in that which `unet` names."""
    key = _key(entry, part)
    if key == "path" or entry.unet_path is None:
        return part_files(root / part, STEMS[part], entry)
    read_json(entry.unet_path / "config.json", entry, key)
    return part_files(entry.unet_path, STEMS[part], entry, key)


def _headers(entry: ModelEntry, part: str, files: PartFiles) -> list[Header]:
    return [read_header(path, entry, _key(entry, part)) for path in files.files]


def _key(entry: ModelEntry, part: str) -> str:
    """The key of the entry that says where a part is."""
    return "unet" if part == "unet" and entry.unet is not None else "path"


def _named(folders: Mapping[str, PartFiles]) -> dict[str, Path]:
    """Weight files by their names in a diffusers folder, wherever they lie."""
    return {f"{part}/{path.name}": path for part, files in folders.items() for path in files.files}


def _width(entry: ModelEntry, headers: Iterable[Header], name: str) -> int:
    """What a layer takes in: the second number of its weight's shape. `name`: how the weight's name ends."""
    for header in headers:
        for tensor, info in header.tensors.items():
            if tensor.endswith(name) and len(info.shape) > 1:
                return info.shape[1]
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
    folders = {} if entry.unet is None else {"unet": _part_files(entry, path, "unet")}
    unet = _headers(entry, "unet", folders["unet"]) if folders else [header]
    return Checkpoint(
        entry=entry,
        layout=layout,
        root=path,
        config=config,
        files={path.name: path} | _named(folders),
        folders=folders,
        in_channels=_width(entry, unet, _FOLDER_INPUT if folders else _SINGLE_INPUT),
        context_width=_width(entry, unet, _FOLDER_CONTEXT if folders else layout.single_context),
        prediction=_prediction(entry, scheduler, _told(header)),
        scheduler=scheduler,
        vocabularies=_vocabularies(entry, layout, config),
    )


def _vocabularies(entry: ModelEntry, layout: Layout, config: Path) -> dict[str, Vocabulary]:
    """That of each text encoder, by the encoder's name: of `text_encoder_2`, in `tokenizer_2`."""
    return {
        part: vocabulary_of(
            entry,
            config / part.replace("text_encoder", "tokenizer") / "tokenizer.json",
            read_json(config / part / "config.json", entry),
        )
        for part in layout.prefixes
        if part.startswith("text_encoder")
    }


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


def _error(entry: Entry, message: str, fix: str, key: str = "path") -> ModelLoadError:
    value = getattr(entry, key)
    return ModelLoadError(f"{entry.name}: {message}", field=entry.field(key), value=value, fix=fix)
