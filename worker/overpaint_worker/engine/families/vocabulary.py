"""Vocabularies: how words become the tokens that a text encoder was trained on. Imports no torch.

CLIP's own is shipped with the worker, and serves nearly every model. A folder may bring another, as its
`tokenizer.json`; then its ids are the model's as much as its weights are, and its digest covers the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from overpaint_shared.errors import ModelLoadError
from overpaint_worker.engine.families.prompt import Marks
from overpaint_worker.registry import Entry

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE: Final = Path(__file__).parent / "clip-tokenizer" / "tokenizer.json"
CLIP_SIZE: Final = 49_408
START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
"""The tokens that frame a text, by name: many real encoders' configurations have wrong ids for them."""
LARGEST_BYTES: Final = 8 * 2**20
"""Of a `tokenizer.json` that is read; CLIP's has 3.6 million bytes."""

_HIGHEST: Final = 2
"""The `eos_token_id` that means the highest id to transformers, as older configurations have it."""


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A tokenizer, and the ids that frame what it makes of a text."""

    tokenizer: Tokenizer
    marks: Marks
    file: Path | None = None
    """Where it was read from, if it is the folder's own; None: CLIP's, which is shipped."""

    def tokenize(self, text: str) -> list[int]:
        """Ids of the words, without start and end."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


@cache
def clip() -> Vocabulary:
    """CLIP's 49,408 byte pairs; a text is filled up with its end."""
    return _of(_parsed(TOKENIZER_FILE.read_bytes()), None)


def vocabulary_of(entry: Entry, file: Path, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a text encoder of this configuration; `file`: where its tokenizer.json would be.

    CLIP's is taken where there is no file, and where the file holds CLIP's tokens under CLIP's ids, whatever
    it holds besides. Any other file must have as many tokens as the encoder.

    Raises `ModelLoadError`: the encoder's vocabulary is not CLIP's and there is no file, or one that cannot
    be read, has no start, another end, or another number of tokens.
    """
    size = _size(entry, config)
    own = _read(entry, file) if file.is_file() else None
    if own is None or _is_clip(own):
        if size < CLIP_SIZE:
            found = f"{_shown(file)} {'is not there' if own is None else 'is that of CLIP'}"
            raise _error(
                entry, f"its text encoder knows {size} tokens, not CLIP's {CLIP_SIZE}, and {found}",
                "add the tokenizer.json that the encoder was trained with",
            )  # fmt: skip
        return _padded_as_trained(clip(), config)
    vocabulary = _of(_checked(entry, own, file, size), file)
    _check_end(entry, vocabulary, config, size)
    return vocabulary


def _size(entry: Entry, config: Mapping[str, Any]) -> int:
    size = config.get("vocab_size", CLIP_SIZE)
    if not isinstance(size, int) or size < 1:
        raise _error(entry, f"its text encoder has the vocab_size {size!r}", "fetch the model again")
    return size


def _is_clip(own: Tokenizer) -> bool:
    return clip().tokenizer.get_vocab().items() <= own.get_vocab().items()


def _padded_as_trained(vocabulary: Vocabulary, config: Mapping[str, Any]) -> Vocabulary:
    """OpenCLIP encoders (SD 2) were trained with zeros after the end, CLIP-L (SD 1) with the end repeated.

    Their configurations name the wrong padding more often than not; the activation tells the two apart.
    """
    zeros = config.get("hidden_act") == "gelu"
    return replace(vocabulary, marks=replace(vocabulary.marks, pad=0)) if zeros else vocabulary


def _checked(entry: Entry, own: Tokenizer, file: Path, size: int) -> Tokenizer:
    tokens = own.get_vocab()
    if len(tokens) != size or max(tokens.values()) >= size:
        raise _error(
            entry, f"{_shown(file)} has {len(tokens)} tokens, and the text encoder knows {size}",
            "use the tokenizer.json that the encoder was trained with",
        )  # fmt: skip
    for mark in (START, END):
        if mark not in tokens:
            raise _error(
                entry, f"{_shown(file)} has no token {mark}", f"call the start {START} and the end {END}"
            )
    return own


def _check_end(entry: Entry, vocabulary: Vocabulary, config: Mapping[str, Any], size: int) -> None:
    """An encoder takes what stands for the whole text at `eos_token_id`; elsewhere it would be noise."""
    said, end = config.get("eos_token_id", clip().marks.end), vocabulary.marks.end
    if end != (size - 1 if said == _HIGHEST else said):
        raise _error(
            entry, f"its tokenizer ends a text with the token {end}, and its text encoder with {said}",
            f"write eos_token_id = {end} into the text encoder's config.json",
        )  # fmt: skip


def _read(entry: Entry, file: Path) -> Tokenizer:
    try:
        with file.open("rb") as opened:
            data = opened.read(LARGEST_BYTES + 1)
    except OSError as cause:
        raise _error(entry, f"{_shown(file)} cannot be read: {cause.strerror}", "check the file") from cause
    if len(data) > LARGEST_BYTES:
        raise _error(entry, f"{_shown(file)} has more than {LARGEST_BYTES} bytes", "use a smaller vocabulary")
    try:
        return _parsed(data)
    except Exception as cause:  # the library raises plain exceptions
        raise _error(entry, f"{_shown(file)} cannot be read: {cause}", "fetch it again") from cause


def _parsed(data: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_buffer(data)
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _of(tokenizer: Tokenizer, file: Path | None) -> Vocabulary:
    tokens = tokenizer.get_vocab()
    return Vocabulary(tokenizer, Marks(tokens[START], tokens[END], tokens[END]), file)


def _shown(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _error(entry: Entry, message: str, fix: str) -> ModelLoadError:
    return ModelLoadError(f"{entry.name}: {message}", field=entry.field("path"), value=entry.path, fix=fix)
