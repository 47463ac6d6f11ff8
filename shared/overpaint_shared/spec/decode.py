"""From bytes to JSON text that is safe to validate: of bounded size, every key once, every number finite."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn

from overpaint_shared.errors import Problem, SpecError, shorten

LARGEST_SPEC_BYTES: Final = 256 * 1024
_LAST_COMMA: Final = re.compile(r",\s*[}\]]")
"""Where newer versions of Python's parser stop."""


class _DuplicateKeyError(ValueError):
    """A key stands twice in one object."""


class _NotFiniteError(ValueError):
    """A number that JSON does not have."""


def decode(data: str | bytes | Mapping[str, Any], where: str) -> str:
    """The JSON text of one object. Raises SpecError."""
    text = data if isinstance(data, str | bytes) else _dump(data, where)
    size = len(text)
    if size <= LARGEST_SPEC_BYTES and isinstance(text, str):
        size = len(text.encode(errors="replace"))
    if size > LARGEST_SPEC_BYTES:
        _fail(where, "is too large", given=f"{size} bytes", allowed=f"at most {LARGEST_SPEC_BYTES} bytes")
    if isinstance(text, bytes):
        text = _text(text, where)
    _check(text, where)
    return text


def _dump(data: Mapping[str, Any], where: str) -> str:
    try:
        return json.dumps(data, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        _fail(
            where,
            f"cannot be written as JSON: {error}",
            allowed="objects, lists, strings, numbers, true, false, null",
        )


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _fail(
            where,
            f"is not UTF-8 text (byte {error.start})",
            given=shorten(data[:40].hex()),
            allowed="a JSON file",
        )


def _check(text: str, where: str) -> None:
    """Read the text once with Python's parser, which sees what the validator's would let pass."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_finite)
        text.encode()
    except json.JSONDecodeError as error:
        _broken(error, text, where)
    except _DuplicateKeyError as error:
        _fail(where, f"has the key {error} twice in one object", allowed="each key once")
    except _NotFiniteError as error:
        message, path = f"holds {error}, which is no JSON number", _path_of_constant(text)
        _fail(where, message, path=path, given=str(error), allowed="a finite number")
    except RecursionError:
        _fail(where, "is nested too deep")
    except ValueError as error:  # a number of thousands of digits, a lone surrogate
        _fail(where, f"cannot be read: {shorten(str(error).split(';')[0])}")
    if not isinstance(value, dict):
        _fail(where, "is not an object", given=shorten(value, 80), allowed='an object, {"version": 1, ...}')


def _broken(error: json.JSONDecodeError, text: str, where: str) -> NoReturn:
    """Name the place that must change: of a comma too many that comma, which the parser stops behind."""
    at, message = error.pos, error.msg
    before = text[:at].rstrip()
    if text.startswith(("//", "/*", "#"), at):
        message = "it holds a comment, which JSON does not have"
    elif (before.endswith(",") and text[at : at + 1] in {"}", "]"}) or _LAST_COMMA.match(text, at):
        at = at if text[at : at + 1] == "," else len(before) - 1
        message = "a comma stands after the last entry, which JSON does not have"
    lines = text[:at].split("\n")
    line = text.split("\n")[len(lines) - 1].strip()
    _fail(
        where,
        f"is not JSON: {message}, line {len(lines)}, column {len(lines[-1]) + 1}",
        given=shorten(line, 80) if line else None,
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(shorten(twice, 80))
    return value


def _path_of_constant(text: str) -> str:
    """Where the first number is that JSON does not have; empty if the text is broken further on."""
    try:
        return next(_paths(json.loads(text, parse_constant=_NotFiniteError), ""), "")
    except (ValueError, RecursionError):
        return ""


def _paths(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, _NotFiniteError):
        yield path
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _paths(inner, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, f"{path}.{shorten(key, 80)[1:-1]}".removeprefix("."))


def _not_finite(constant: str) -> NoReturn:
    raise _NotFiniteError(constant)


def _fail(
    where: str, message: str, *, path: str = "", given: str | None = None, allowed: str | None = None
) -> NoReturn:
    message = message if path else f"the text {message}"
    raise SpecError(
        f"{where} is wrong:", [Problem(path=path, message=message, given=given, allowed=allowed)]
    ) from None
