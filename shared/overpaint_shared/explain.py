"""From pydantic's errors to problems in words: where in the file, what was given, what may stand there, what is nearest."""

import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from overpaint_shared.errors import Problem, SpecError, shorten
from overpaint_shared.spec.fields import NAME_PATTERN, RULE_ERROR, TAGS, nearest

_LONGEST_GIVEN = 80
_MOST_PROBLEMS = 20
_QUOTED = re.compile(r"'([^']*)'")

_TYPES = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}


def explain(error: ValidationError, model: type[BaseModel], where: str) -> SpecError:
    """The SpecError that says what pydantic found in the spec named `where`."""
    found = problems(error, model)
    hidden = len(found) - _MOST_PROBLEMS
    more = f"and {hidden} more" if hidden > 0 else None
    return SpecError(f"{where} is wrong:", found[:_MOST_PROBLEMS], fix=more)


def problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """One problem for each thing that pydantic found, in its order."""
    details = error.errors(include_url=False)
    return [p for detail in details if not _is_echo(detail, details) for p in _problems(detail, model)]


def _is_echo(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> bool:
    """Whether another error is the cause of this one."""
    if detail["type"] == "default_factory_not_called":
        return True
    loc = detail["loc"]
    return detail["type"] == "too_short" and any(
        other["loc"][: len(loc)] == loc and len(other["loc"]) > len(loc) for other in details
    )


def _problems(detail: ErrorDetails, model: type[BaseModel]) -> Iterable[Problem]:
    path, inner = _walk(detail["loc"], model)
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == RULE_ERROR:
        return [replace(rule, path=join(path, rule.path)) for rule in context["problems"]]
    if kind == "missing":
        return [Problem(path=path, message="is missing")]
    if kind == "extra_forbidden":
        return [_unknown_key(path, str(detail["loc"][-1]), inner)]
    given = shorten(detail["input"], _LONGEST_GIVEN)
    if kind in {"union_tag_not_found", "union_tag_invalid", "literal_error", "enum"}:
        return [_unknown_choice(path, kind, context, detail["input"])]
    message, allowed = _plain(kind, context, detail["msg"])
    return [Problem(path=path, message=f"{given} {message}", given=given, allowed=allowed)]


def _unknown_key(path: str, key: str, model: type[BaseModel] | None) -> Problem:
    known = sorted(field.alias or name for name, field in model.model_fields.items()) if model else []
    return Problem(
        path=path,
        message="is not a key that is known here",
        given=shorten(key, _LONGEST_GIVEN),
        allowed=", ".join(known) or None,
        suggestion=nearest(key, known),
    )


def _unknown_choice(path: str, kind: str, context: dict[str, Any], given: object) -> Problem:
    names = _QUOTED.findall(str(context.get("expected_tags") or context.get("expected", "")))
    allowed = ", ".join(names) or str(context.get("expected", "")) or None
    if kind.startswith("union_tag"):
        tag = _QUOTED.findall(str(context["discriminator"]))[-1]
        if kind == "union_tag_not_found":
            return Problem(
                path=join(path, tag), message="is missing: it says which kind this is", allowed=allowed
            )
        path, given = join(path, tag), context.get("tag")
    written = shorten(given, _LONGEST_GIVEN)
    suggestion = nearest(given, names) if isinstance(given, str) else None
    return Problem(
        path=path,
        message=f"{written} is not known here",
        given=written,
        allowed=allowed,
        suggestion=suggestion,
    )


def _plain(kind: str, context: dict[str, Any], message: str) -> tuple[str, str | None]:
    """The message and what is allowed, for a fault that names and paths do not matter to."""
    if kind in _TYPES:
        return f"is not {_TYPES[kind]}", _TYPES[kind]
    if kind == "overpaint_value":
        return str(context["message"]), context.get("allowed")
    if kind == "string_pattern_mismatch" and context.get("pattern") == NAME_PATTERN:
        return "is not a name", "a lower-case letter or digit, then at most 63 of a-z 0-9 . _ -"
    for key, words in _BOUNDS.items():
        if key in context:
            return words[0].format(context[key]), words[1].format(context[key])
    return message[:1].lower() + message[1:], None


_BOUNDS = {
    "ge": ("is too small", "{} or more"),
    "gt": ("is too small", "more than {}"),
    "le": ("is too large", "{} or less"),
    "lt": ("is too large", "less than {}"),
    "min_length": ("is too short", "{} or more entries"),
    "max_length": ("is too long", "{} or fewer entries"),
}


def join(path: str, more: str) -> str:
    """Two paths as one."""
    return f"{path}.{more}" if path and more else path or more


def _walk(loc: Sequence[int | str], model: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The path as written in the file, and the model whose key comes last.

    pydantic's own location also holds the tag that chose a member of a union: `mask.image.channel` for the key `channel`
    of a mask with `"from": "image"`. Following the models' types tells a tag from a key of the same name.
    """
    path, inner = "", None
    here: Any = model
    for step in loc:
        here = _bare(here)
        members = _members(here)
        if members:
            here = next((member for member in members if step in _tags_of(member)), None)
        elif isinstance(step, int):
            path, here = f"{path}[{step}]", (get_args(here) or (None,))[0]
        else:
            inner = here if isinstance(here, type) and issubclass(here, BaseModel) else None
            path, here = join(path, step), _field(inner, step)
    return path, inner


def _bare(annotation: Any) -> Any:
    """The annotation without `Annotated` and without `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
            continue
        options = [option for option in get_args(annotation) if option is not types.NoneType]
        if get_origin(annotation) in {Union, types.UnionType} and len(options) == 1:
            annotation = options[0]
            continue
        return annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in {Union, types.UnionType} else ()


def _tags_of(member: Any) -> tuple[Any, ...]:
    for name, field in getattr(member, "model_fields", {}).items():
        if (field.alias or name) in TAGS:
            return get_args(field.annotation)
    return ()


def _field(model: type[BaseModel] | None, key: str) -> Any:
    for name, field in model.model_fields.items() if model else ():
        if (field.alias or name) == key:
            return field.annotation
    return None
