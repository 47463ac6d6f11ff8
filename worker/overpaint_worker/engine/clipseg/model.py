"""CLIPSeg itself: a picture and a text to a map of logits, through transformers' own model and processor."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from overpaint_shared.catalogue import ModelTraits
from overpaint_shared.errors import MaskError, ModelLoadError
from overpaint_worker.engine.clipseg.maps import eight_bits
from overpaint_worker.engine.families.clip import TOKENIZER_FILE, VOCABULARY
from overpaint_worker.engine.families.weights import HashCache, locate, part_files, read_header, read_json
from overpaint_worker.registry import SegmenterEntry

START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
LENGTH: Final = 77
"""Tokens that CLIP's text encoder takes."""
ARCHITECTURE: Final = "clipseg"
_OWN_TENSOR: Final = "decoder.reduces.0.weight"


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A loaded CLIPSeg on one device, in float32."""

    traits: ModelTraits
    _network: Any
    _processor: Any
    _tokenizer: Tokenizer
    _length: int
    """Tokens that the text encoder takes, start and end included."""
    _start: int
    _end: int

    def logits(self, picture: torch.Tensor, text: str, field: str = "mask") -> torch.Tensor:
        """How sure it is of each cell of its own map, float32 [h, w] on the CPU.

        `picture` is [H, W, 3], 0..1, and is shown in 8 bits, cut off, as in the reference. `field` is the
        mask's place in the spec.

        Raises `MaskError`: the text is too long for it.
        """
        device = next(self._network.parameters()).device
        ids = torch.tensor([self._ids(text, field)], device=device)
        seen = self._processor(Image.fromarray(eight_bits(picture)), return_tensors="np")["pixel_values"]
        pixels = torch.from_numpy(np.asarray(seen, dtype=np.float32)).to(device)
        found: torch.Tensor = self._network(input_ids=ids, pixel_values=pixels).logits
        return found.reshape(found.shape[-2:]).to("cpu", torch.float32)

    def _ids(self, text: str, field: str) -> list[int]:
        """Start, the words, and the end, repeated to fill what the text encoder takes."""
        words = self._tokenizer.encode(text, add_special_tokens=False).ids
        if len(words) > self._length - 2:
            raise MaskError(
                f"the text has {len(words)} tokens, and the segmenter takes {self._length - 2}",
                field=f"{field}.text", value=text, fix="use fewer words, or combine several masks",
            )  # fmt: skip
        return [self._start, *words] + [self._end] * (self._length - 1 - len(words))


def inspect(entry: SegmenterEntry, hashes: HashCache) -> ModelTraits:
    """What it is, from headers and configurations alone.

    Raises `ModelLoadError`: something is missing, damaged, a pickle, or no CLIPSeg.
    """
    root = _folder(entry)
    kind = read_json(root / "config.json", entry).get("model_type")
    if kind != ARCHITECTURE:
        raise _error(entry, f"it is of the kind {kind!r}", "name a CLIPSeg model's folder")
    read_json(root / "preprocessor_config.json", entry)
    files = part_files(root, ".", "model", entry).files
    if not any(_OWN_TENSOR in read_header(path, entry).tensors for path in files):
        raise _error(entry, f"it has no {_OWN_TENSOR}", "fetch the model again")
    digest = hashes.digest({path.name: path for path in files})
    _tokenizer(entry, root, read_json(root / "config.json", entry))
    return ModelTraits(name=entry.name, kind="segmenter", family=ARCHITECTURE, sha256=digest)


def load(entry: SegmenterEntry, device: torch.device, hashes: HashCache) -> Segmenter:
    """Read it onto a device. Raises `ModelLoadError`, also where the weights' digest is not the entry's."""
    from transformers.models.clipseg.modeling_clipseg import CLIPSegForImageSegmentation
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    traits, root = inspect(entry, hashes), _folder(entry)
    if entry.sha256 is not None and traits.sha256 != entry.sha256:
        raise _error(
            entry, f"its digest is {traits.sha256}", "fetch the model again, or correct it", "sha256"
        )
    config = read_json(root / "config.json", entry)
    try:
        with _quiet():
            loaded: Any = CLIPSegForImageSegmentation.from_pretrained(
                str(root), local_files_only=True, use_safetensors=True, output_loading_info=True,
                dtype=torch.float32,
            )  # fmt: skip
            processor = ViTImageProcessorPil.from_pretrained(str(root), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as cause:
        message = f"the weights do not fit their configuration: {cause}"
        raise _error(entry, message, "fetch the model again") from cause
    network, info = loaded
    if missing := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise _error(entry, f"weights are missing: {missing[0]}", "fetch the model again")
    network.requires_grad_(requires_grad=False).eval()
    length = int(config.get("text_config", {}).get("max_position_embeddings", LENGTH))
    tokenizer = _tokenizer(entry, root, config)
    start, end = (tokenizer.token_to_id(mark) or 0 for mark in (START, END))
    return Segmenter(traits, network.to(device), processor, tokenizer, length, start, end)


def _folder(entry: SegmenterEntry) -> Path:
    root = locate(entry)
    if not root.is_dir():
        raise _error(entry, "a segmenter is a folder", "name the folder with config.json")
    return root


def _tokenizer(entry: SegmenterEntry, root: Path, config: dict[str, Any]) -> Tokenizer:
    """The folder's own `tokenizer.json`, or CLIP's, which is shipped, if the vocabulary is CLIP's."""
    own = root / "tokenizer.json"
    size = int(config.get("text_config", {}).get("vocab_size", VOCABULARY))
    if not own.is_file() and size != VOCABULARY:
        raise _error(
            entry, f"its vocabulary of {size} is not CLIP's, and it has no tokenizer.json", "add that file"
        )
    try:
        loaded = Tokenizer.from_file(str(own if own.is_file() else TOKENIZER_FILE))
    except Exception as cause:  # the library raises plain exceptions
        raise _error(entry, f"tokenizer.json cannot be read: {cause}", "fetch it again") from cause
    if None in (loaded.token_to_id(START), loaded.token_to_id(END)) or loaded.get_vocab_size() > size:
        raise _error(entry, "tokenizer.json is not for this model", "fetch both again")
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loader's progress bar and advice."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _error(entry: SegmenterEntry, message: str, fix: str, key: str = "path") -> ModelLoadError:
    value = getattr(entry, key)
    return ModelLoadError(f"{entry.name}: {message}", field=entry.field(key), value=value, fix=fix)
