"""CLIPSeg itself: a picture and a text to a map of logits, through transformers' own model and processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from overpaint_shared.catalogue import ModelTraits
from overpaint_shared.errors import MaskError, ModelLoadError
from overpaint_worker.engine.clipseg.maps import eight_bits
from overpaint_worker.engine.families.loading import quiet
from overpaint_worker.engine.families.vocabulary import Vocabulary, vocabulary_of
from overpaint_worker.engine.families.weights import (
    HashCache,
    checked_digest,
    locate,
    part_files,
    read_header,
    read_json,
)  # fmt: skip
from overpaint_worker.registry import SegmenterEntry

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
    _vocabulary: Vocabulary
    _length: int
    """Tokens that the text encoder takes, start and end included."""

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
        words, marks = self._vocabulary.tokenize(text), self._vocabulary.marks
        if len(words) > self._length - 2:
            raise MaskError(
                f"the text has {len(words)} tokens, and the segmenter takes {self._length - 2}",
                field=f"{field}.text", value=text, fix="use fewer words, or combine several masks",
            )  # fmt: skip
        return [marks.start, *words] + [marks.end] * (self._length - 1 - len(words))


@dataclass(frozen=True, slots=True)
class _Folder:
    """What a CLIPSeg's folder holds."""

    root: Path
    config: Mapping[str, Any]
    """Of its text encoder."""
    files: Mapping[str, Path]
    """Its weights, and its tokenizer where that is its own, by name."""
    variant: str | None
    vocabulary: Vocabulary


def inspect(entry: SegmenterEntry, hashes: HashCache) -> ModelTraits:
    """What it is, from headers and configurations alone.

    Raises `ModelLoadError`: something is missing, damaged, a pickle, no CLIPSeg, or of another sha256.
    """
    return _traits(_survey(entry), entry, hashes)


def load(entry: SegmenterEntry, device: torch.device, hashes: HashCache) -> Segmenter:
    """Read it onto a device. Raises `ModelLoadError`: as `inspect`, or its weights do not fit."""
    from transformers.models.clipseg.modeling_clipseg import CLIPSegForImageSegmentation
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    found = _survey(entry)
    traits = _traits(found, entry, hashes)
    try:
        with quiet():
            loaded: Any = CLIPSegForImageSegmentation.from_pretrained(
                str(found.root), local_files_only=True, use_safetensors=True, output_loading_info=True,
                variant=found.variant, dtype=torch.float32,
            )  # fmt: skip
            processor = ViTImageProcessorPil.from_pretrained(str(found.root), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as cause:
        message = f"the weights do not fit their configuration: {cause}"
        raise _error(entry, message, "fetch the model again") from cause
    network, info = loaded
    if missing := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise _error(entry, f"weights are missing: {missing[0]}", "fetch the model again")
    network.requires_grad_(requires_grad=False).eval()
    length = int(found.config.get("max_position_embeddings", LENGTH))
    return Segmenter(traits, network.to(device), processor, found.vocabulary, length)


def _survey(entry: SegmenterEntry) -> _Folder:
    root = locate(entry)
    if not root.is_dir():
        raise _error(entry, "a segmenter is a folder", "name the folder with config.json")
    config = read_json(root / "config.json", entry)
    if (kind := config.get("model_type")) != ARCHITECTURE:
        raise _error(entry, f"it is of the kind {kind!r}", "name a CLIPSeg model's folder")
    read_json(root / "preprocessor_config.json", entry)
    part = part_files(root, "model", entry)
    if not any(_OWN_TENSOR in read_header(path, entry).tensors for path in part.files):
        raise _error(entry, f"it has no {_OWN_TENSOR}", "fetch the model again")
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise _error(entry, f"its config.json has the text_config {text!r}", "fetch the model again")
    vocabulary = vocabulary_of(entry, root / "tokenizer.json", text)
    own = [vocabulary.file] if vocabulary.file else []
    return _Folder(root, text, {path.name: path for path in (*part.files, *own)}, part.variant, vocabulary)


def _traits(found: _Folder, entry: SegmenterEntry, hashes: HashCache) -> ModelTraits:
    digest = checked_digest(hashes, entry, found.files, single=False)
    return ModelTraits(name=entry.name, kind="segmenter", family=ARCHITECTURE, sha256=digest)


def _error(entry: SegmenterEntry, message: str, fix: str) -> ModelLoadError:
    return ModelLoadError(f"{entry.name}: {message}", field=entry.field("path"), value=entry.path, fix=fix)
