"""What all parts of the spec are made of: the base class, names, references to pictures, ranges."""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from overpaint_shared.errors import Problem

NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""A name of a model, ControlNet, LoRA, segmenter, VAE or owner: lower case, at most 64 characters."""

LONGEST_PROMPT: Final = 20_000
LONGEST_PATH: Final = 4096
LONGEST_LINE: Final = 256
LONGEST_KEY: Final = 512
LONGEST_KEY_BYTES: Final = 800
"""S3 counts bytes: 1024, with what stands before it."""
LARGEST_SIDE: Final = 16_384
LARGEST_SEED: Final = 2**64 - 1

RULE_ERROR: Final = "overpaint_rule"
"""Type of the pydantic error that carries `Problem`s of a rule between fields; `explain` unfolds it."""

VALUE_ERROR: Final = "overpaint_value"
"""Type of the pydantic error whose words are our own."""

ReferenceKind = Literal["path", "s3", "sha256"]

_LINE_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""What moves a terminal's cursor, breaks a line, or turns the direction of writing."""
_CONTROL_IN_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NAME = re.compile(NAME_PATTERN[1:-1])
_BUCKET_AND_KEY = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^\x00-\x1f]{1,1024}")
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_OTHER_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/?/")


def _tag_is_required(schema: dict[str, Any]) -> None:
    """In the JSON Schema a tag (`op`, `from`, `kind`) has one value and must be written."""
    tags = [name for name, field in schema.get("properties", {}).items() if name in TAGS and "const" in field]
    if tags:
        schema["required"] = tags + [name for name in schema.get("required", ()) if name not in tags]


TAGS: Final = ("op", "from", "kind")
"""The keys that say which of several shapes an object has."""


class Part(BaseModel):
    """A piece of the spec: frozen, strict about types, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=False,
        json_schema_extra=_tag_is_required,
    )


def refuse(*problems: Problem) -> PydanticCustomError:
    """A pydantic error that carries problems, their paths relative to the model that raises it."""
    # The template has no place-holders, so that braces in a message stay braces.
    return PydanticCustomError(RULE_ERROR, "breaks a rule between fields", {"problems": problems})


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The most similar of the known names, or None when none is similar."""
    known = list(known)
    folded = {option.casefold(): option for option in known}
    found = difflib.get_close_matches(name[:200].casefold(), folded, n=1, cutoff=0.5)
    return folded[found[0]] if found else None


def is_name(text: str) -> bool:
    """Whether the text may name a model or another registry entry; see `NAME_PATTERN`."""
    return _NAME.fullmatch(text) is not None


def is_line(text: str) -> bool:
    """Whether the text may be a group, a label or a token: one line that moves no cursor."""
    return 0 < len(text) <= LONGEST_LINE and not _CONTROL.search(text)


def reference_kind(reference: str) -> ReferenceKind:
    """Where a picture's reference points: a local path, an object of another bucket, or a stored input."""
    if reference.startswith("s3://"):
        return "s3"
    return "sha256" if reference.startswith("sha256:") else "path"


def value_error(message: str, *, allowed: str) -> PydanticCustomError:
    """A pydantic error in our own words: what is wrong with the value, and what may stand there."""
    return PydanticCustomError(VALUE_ERROR, "{message}", {"message": message, "allowed": allowed})


def _check_reference(reference: str) -> str:
    if _LINE_CONTROL.search(reference):
        raise value_error("holds control characters", allowed="a path, s3://bucket/key or sha256:<hex>")
    if reference.startswith("s3://"):
        if not _BUCKET_AND_KEY.fullmatch(reference):
            raise value_error("is not an S3 address", allowed="s3://bucket/key")
    elif reference.startswith("sha256:"):
        if not _SHA256.fullmatch(reference):
            raise value_error("is not a hash", allowed="sha256: and 64 lower-case hexadecimal digits")
    elif _OTHER_SCHEME.match(reference):
        raise value_error(
            "is an address that Overpaint does not fetch", allowed="a path, s3://bucket/key or sha256:<hex>"
        )
    return reference


def _check_text(text: str) -> str:
    if _CONTROL_IN_TEXT.search(text):
        raise value_error("holds control characters", allowed="text, tabs and line breaks")
    return text


def _check_line(text: str) -> str:
    if _CONTROL.search(text):
        raise value_error("holds control characters or line breaks", allowed="one line of text")
    return text


def _check_key(key: str) -> str:
    parts = key.split("/")
    if len(key.encode(errors="surrogatepass")) > LONGEST_KEY_BYTES:
        raise value_error("is too long in UTF-8", allowed=f"at most {LONGEST_KEY_BYTES} bytes")
    if _CONTROL.search(key) or "\\" in key:
        raise value_error(
            "holds control characters or backslashes", allowed="a relative key, e.g. shots/012.png"
        )
    if any(part in ("", ".", "..") for part in parts):
        raise value_error(
            "is not a relative key",
            allowed="parts divided by single `/`, none of them `.` or `..`, e.g. shots/012.png",
        )
    return key


Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Reference = Annotated[str, Field(min_length=1, max_length=LONGEST_PATH), AfterValidator(_check_reference)]
Text = Annotated[str, Field(max_length=LONGEST_PROMPT), AfterValidator(_check_text)]
Line = Annotated[str, Field(min_length=1, max_length=LONGEST_LINE), AfterValidator(_check_line)]
LabelValue = Annotated[str, Field(max_length=LONGEST_LINE), AfterValidator(_check_line)]
Key = Annotated[str, Field(min_length=1, max_length=LONGEST_KEY), AfterValidator(_check_key)]

Share = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=0, le=LARGEST_SIDE)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
