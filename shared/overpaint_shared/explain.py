"""From pydantic's errors to words: where in the file, what was given, what may stand there, the nearest."""

import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from overpaint_shared.errors import Problem, SpecError, shorten
from overpaint_shared.spec.fields import NAME_PATTERN, RULE_ERROR, TAGS, VALUE_ERROR, nearest

Show = Callable[[Sequence[int | str], object], str]
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
}


def explain(error: ValidationError, model: type[BaseModel], where: str) -> SpecError:
    """The SpecError that says what pydantic found in the spec named `where`; its first 20 problems."""
    details = _causes(error)
    found = _explained(details[:_MOST_PROBLEMS], model, _shown)
    hidden = len(found) + len(details[_MOST_PROBLEMS:]) - _MOST_PROBLEMS
    more = f"and {hidden} more" if hidden > 0 else None
    return SpecError(f"{where} is wrong:", found[:_MOST_PROBLEMS], fix=more)


def problems(
    error: ValidationError,
    model: type[BaseModel],
    show: Show | None = None,
) -> list[Problem]:
    """One problem for each thing that pydantic found, in its order.

    `show(location, value)` writes a given value; absent: as JSON, shortened.
    """
    return _explained(_causes(error), model, show or _shown)


def _explained(details: Iterable[ErrorDetails], model: type[BaseModel], show: Show) -> list[Problem]:
    return [
        problem
        for detail in details
        for problem in _problems(detail, _walk(detail["loc"], model), show(detail["loc"], detail["input"]))
    ]


def _shown(_: Sequence[int | str], value: object) -> str:
    return shorten(value, _LONGEST_GIVEN)


def join(path: str, more: str) -> str:
    """Two paths as one."""
    return f"{path}.{more}" if path and more else path or more


def _causes(error: ValidationError) -> list[ErrorDetails]:
    """What pydantic found, without what another of its errors is the cause of."""
    details = error.errors(include_url=False)
    around = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
    return [
        detail
        for detail in details
        if detail["type"] != "default_factory_not_called"
        and not (detail["type"] == "too_short" and detail["loc"] in around)
    ]


@dataclass(frozen=True)
class _Place:
    """Where an error is: the path as written in the file, the model with the last key, the value's type."""

    path: str
    model: type[BaseModel] | None
    annotation: Any


def _problems(detail: ErrorDetails, place: _Place, given: str) -> list[Problem]:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == RULE_ERROR:
        return [replace(rule, path=join(place.path, rule.path)) for rule in context["problems"]]
    if kind == "missing":
        return [Problem(path=place.path, message="is missing")]
    if kind == "extra_forbidden":
        return [_unknown_key(place, str(detail["loc"][-1]))]
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        return [_unknown_tag(place.path, kind, context)]
    if kind == "dict_type" and (shapes := _shapes(place.annotation)):
        return [_no_shape(place.path, shapes, detail["input"], given)]
    if kind == "literal_error":
        return [_unknown_choice(place.path, str(context["expected"]), detail["input"])]
    message, allowed = _plain(kind, context, place.annotation) or (detail["msg"], None)
    return [Problem(path=place.path, message=f"{given} {message}", given=given, allowed=allowed)]


def _unknown_key(place: _Place, key: str) -> Problem:
    fields = place.model.model_fields if place.model else {}
    known = sorted(field.alias or name for name, field in fields.items())
    return Problem(
        path=place.path,
        message="is not a key that is known here",
        given=shorten(key, _LONGEST_GIVEN),
        allowed=", ".join(known) or None,
        suggestion=_deeper(place.model, key) or nearest(key, known),
    )


def _deeper(model: type[BaseModel] | None, key: str) -> str | None:
    """`sampling.denoise` for `denoise`: the one plain part of an object that has the key."""
    fields = model.model_fields if model else {}
    parts = {field.alias or name: _bare(field.annotation) for name, field in fields.items()}
    found = [
        f"{name}.{key}"
        for name, part in parts.items()
        if isinstance(part, type) and issubclass(part, BaseModel) and _field(part, key) is not None
    ]
    return found[0] if len(found) == 1 else None


def _unknown_tag(path: str, kind: str, context: Mapping[str, Any]) -> Problem:
    """The key that says which shape an object has is missing or unknown."""
    tag = _QUOTED.findall(str(context["discriminator"]))[-1]
    if kind == "union_tag_not_found":
        return Problem(path=join(path, tag), message="is missing: it says which kind this is")
    return _unknown_choice(join(path, tag), str(context["expected_tags"]), context["tag"])


def _no_shape(path: str, shapes: Mapping[str, str], value: object, given: str) -> Problem:
    """A bare word where an object is wanted whose one key may be that word: `"method": "img2img"`."""
    word = nearest(value, list(shapes)) if isinstance(value, str) else None
    return Problem(
        path=path,
        message=f"{given} is not an object",
        given=given,
        allowed=", ".join(shapes.values()),
        suggestion=shapes[word] if word else None,
    )


def _unknown_choice(path: str, expected: str, given: object) -> Problem:
    names = _QUOTED.findall(expected)
    return Problem(
        path=path,
        message=f"{shorten(given, _LONGEST_GIVEN)} is not known here",
        given=shorten(given, _LONGEST_GIVEN),
        allowed=", ".join(names) or expected,
        suggestion=nearest(given, names) if isinstance(given, str) else None,
    )


def _plain(kind: str, context: Mapping[str, Any], annotation: Any) -> tuple[str, str | None] | None:
    """What is wrong with a plain value and what is allowed, or None when pydantic's own words must do."""
    if kind in _TYPES:
        return f"is not {_TYPES[kind]}", _range(annotation) or _TYPES[kind]
    if kind == VALUE_ERROR:
        return context["message"], context.get("allowed")
    if kind == "string_pattern_mismatch":
        is_name = context.get("pattern") == NAME_PATTERN
        allowed = "a lower-case letter or digit, then at most 63 of a-z 0-9 . _ -"
        return ("is not a name", allowed) if is_name else ("has a wrong form", str(context.get("pattern")))
    if kind in {"greater_than_equal", "less_than_equal"}:
        return ("is too small" if "ge" in context else "is too large"), _range(annotation)
    unit = "characters" if kind.startswith("string") else "entries"
    if "min_length" in context:
        return "is too short", f"{context['min_length']} {unit} or more"
    if "max_length" in context:
        return "is too long", f"at most {context['max_length']} {unit}"
    return None


def _range(annotation: Any) -> str | None:
    """`1 to 10000`, from the bounds that the type carries; None if it has none."""
    bounds = dict(_bounds(annotation))
    if "ge" in bounds and "le" in bounds:
        return f"{bounds['ge']} to {bounds['le']}"
    if "ge" in bounds:
        return f"{bounds['ge']} or more"
    return None


def _bounds(annotation: Any) -> Iterator[tuple[str, Any]]:
    for extra in getattr(annotation, "__metadata__", ()):
        for mark in extra.metadata if isinstance(extra, FieldInfo) else (extra,):
            yield from ((name, getattr(mark, name)) for name in ("ge", "le") if hasattr(mark, name))
    if get_origin(annotation) in {Annotated, Union, types.UnionType}:
        for inner in get_args(annotation):
            yield from _bounds(inner)


def _walk(loc: Sequence[int | str], model: type[BaseModel]) -> _Place:
    """Follow pydantic's location through the models' types.

    Its location also holds the tag that chose a member of a union: `mask.image.channel` for the key `channel`
    of a mask with `"from": "image"`. The types tell a tag from a key of the same name.
    """
    path, owner = "", None
    here: Any = model
    for step in loc:
        bare = _bare(here)
        if members := _members(bare):
            here = next((member for member in members if step in _tags_of(member)), None)
        elif isinstance(step, int):
            path, here = f"{path}[{step}]", (get_args(bare) or (None,))[0]
        elif step != "[key]":  # a fault of a key itself stands at `labels.<key>.[key]`
            owner = bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None
            key = shorten(step, _LONGEST_GIVEN)[1:-1]  # a stranger's, of any length
            path, here = join(path, key), _field(owner, step)
    return _Place(path, owner, here)


def _bare(annotation: Any) -> Any:
    """The annotation without `Annotated` and without `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif len(options := _members(annotation)) == 1:
            annotation = options[0]
        else:
            return annotation


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) not in {Union, types.UnionType}:
        return []
    return [option for option in get_args(annotation) if option is not types.NoneType]


def _tags_of(member: Any) -> tuple[Any, ...]:
    return _tag_of(member)[1]


def _tag_of(member: Any) -> tuple[str, tuple[Any, ...]]:
    """The key that says which member of a union an object is, and what it holds; empty if there is none."""
    for name, field in getattr(member, "model_fields", {}).items():
        if (key := field.alias or name) in TAGS:
            return key, get_args(field.annotation)
    return "", ()


def _shapes(annotation: Any) -> dict[str, str]:
    """How an object of each member of a union begins, by its tag: `{"kind": "img2img"}`."""
    keys = (_tag_of(member) for member in _members(_bare(annotation)))
    return {str(tag): json.dumps({key: tag}) for key, tags in keys for tag in tags}


def _field(model: type[BaseModel] | None, key: str) -> Any:
    """The type of a model's key, with its bounds."""
    for name, field in model.model_fields.items() if model else ():
        if (field.alias or name) == key:
            return Annotated[field.annotation, field]
    return None
