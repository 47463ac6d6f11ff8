"""Job specs for property tests, drawn from the project's own JSON Schema, so that no field is forgotten."""

import string
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from overpaint_shared.job import LARGEST_SEED, schema

_SCHEMA = schema()
_NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,9}", fullmatch=True)
_REFERENCES = st.one_of(
    st.text(string.ascii_letters + " ./äß", min_size=1, max_size=12),
    _NAMES.map(lambda name: f"s3://bucket/{name}"),
    st.binary(min_size=32, max_size=32).map(lambda digest: f"sha256:{digest.hex()}"),
)
_TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20)
_STRINGS: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, LARGEST_SEED).map(str),
    "image": _REFERENCES,
    "key": _NAMES,
    "prompt": _TEXT,
    "negative_prompt": _TEXT,
    "text": _TEXT,
}
_MOST = {"masks": 3}


def _resolve(node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = _SCHEMA["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def definition(name: str) -> dict[str, Any]:
    """The schema's node of that name."""
    node: dict[str, Any] = _SCHEMA["$defs"][name]
    return node


def values(node: dict[str, Any], name: str = "", depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that the schema's node allows. An unknown kind of node fails: the schema cannot outgrow this."""
    node = _resolve(node)
    if options := node.get("oneOf") or node.get("anyOf"):
        resolved = [_resolve(option) for option in options]
        # No deeper than the spec allows.
        kept = [option for option in resolved if depth < 2 or "masks" not in option.get("properties", {})]
        return st.one_of([values(option, name, depth) for option in kept])
    if "const" in node or "enum" in node:
        return st.sampled_from(node.get("enum") or [node["const"]])
    return _KINDS[node["type"]](node, name, depth)


def _array(node: dict[str, Any], name: str, depth: int) -> st.SearchStrategy[Any]:
    low = node.get("minItems", 0)
    return st.lists(
        values(node["items"], name, depth + 1), min_size=low, max_size=max(low, _MOST.get(name, 2))
    )


def _string(node: dict[str, Any], name: str, _: int) -> st.SearchStrategy[Any]:
    return _STRINGS.get(name, _NAMES if "pattern" in node else _TEXT)


def _object(node: dict[str, Any], _: str, depth: int) -> st.SearchStrategy[Any]:
    return objects(node, depth) if "properties" in node else st.dictionaries(_TEXT, _TEXT, max_size=3)


_KINDS: dict[str, Callable[[dict[str, Any], str, int], st.SearchStrategy[Any]]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "integer": lambda node, *_: st.integers(node["minimum"], node["maximum"]),
    "number": lambda node, *_: st.floats(node["minimum"], node["maximum"]),
    "boolean": lambda *_: st.booleans(),
    "null": lambda *_: st.none(),
}


def objects(node: dict[str, Any], depth: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with all required keys and any of the others."""
    required = set(node.get("required", ()))
    fields = {name: values(field, name, depth) for name, field in node["properties"].items()}
    return st.fixed_dictionaries(
        {name: field for name, field in fields.items() if name in required},
        optional={name: field for name, field in fields.items() if name not in required},
    )


def specs() -> st.SearchStrategy[dict[str, Any]]:
    """Specs whose every field is allowed by itself; rules between fields may still be broken."""
    return objects(_SCHEMA)
