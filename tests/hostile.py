"""Hostile job texts for fuzzing: a spec that is right, spoiled in a seeded way, as the text of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from random import Random
from typing import Any

NUMBERS: list[Any] = [
    float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, -0.0, 0.5, -1, 2**31, 2**63, 2**64,
    -(2**64), 10**400, 1e400, 0, True,
]  # fmt: skip
STRINGS = [
    "",
    " ",
    "\0",
    "a\0b",
    "\x1b[31mred\x1b[0m",
    "line\nbreak",
    "\u2028",
    "\u202e",
    "\ud800",
    "é" * 300,
    "a" * 5000,
    "x" * 300_000,
    "../../../etc/passwd",
    "/dev/zero",
    "C:\\..\\x",
    "..",
    "file:///etc/passwd",
    "http://host/a.png",
    "s3://",
    "s3://b/../k",
    "s3://UPPER/k",
    "sha256:",
    "sha256:" + "g" * 64,
    "sha256:" + "a" * 63,
    "{0.__class__}",
    "%s%n",
    "$(id)",
    "'; --",
    "(" * 400,
    "((((a:1e999)))",
    "(a:nan)",
    "18446744073709551616",
    "NaN",
    "\uff11\uff12",
    "-1",
]
KEYS = [
    "",
    "seeed",
    "__class__",
    "\0",
    "\x1b[2J",
    "\ud800",
    "k" * 3000,
    "Model",
    "model ",
    "from",
    "op",
    "kind",
]


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, its root too; of one that is nested for ever, the first twenty levels."""
    yield path
    if len(path) == 20:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _hostile(random: Random) -> Any:
    return random.choice(
        [
            lambda: random.choice(NUMBERS),
            lambda: random.choice(STRINGS),
            lambda: random.choice([None, [], {}, [[]], {"": None}, [None] * 50]),
            lambda: nested(random.choice([5, 200, 20_000])),
            lambda: random.uniform(-1e6, 1e6),
            lambda: random.randrange(-(10**6), 10**6),
            lambda: "".join(chr(random.randrange(0x250)) for _ in range(random.randrange(40))),
        ]
    )()


def _replace(spec: Any, random: Random) -> None:
    path = random.choice([path for path in places(spec) if path])
    _at(spec, path[:-1])[path[-1]] = _hostile(random)


def _remove(spec: Any, random: Random) -> None:
    path = random.choice([path for path in places(spec) if path])
    del _at(spec, path[:-1])[path[-1]]


def _add(spec: Any, random: Random) -> None:
    holders = [path for path in places(spec) if isinstance(_at(spec, path), dict)]
    _at(spec, random.choice(holders))[random.choice(KEYS)] = _hostile(random)


def _transplant(spec: Any, random: Random) -> None:
    paths = [path for path in places(spec) if path]
    what = deepcopy(_at(spec, random.choice(paths)))
    into = random.choice(paths)
    _at(spec, into[:-1])[into[-1]] = what


def _repeat(spec: Any, random: Random) -> None:
    lists = [path for path in places(spec) if isinstance(_at(spec, path), list) and _at(spec, path)]
    if lists:
        path = random.choice(lists)
        _at(spec, path).extend(deepcopy(_at(spec, path)) * random.choice([1, 40]))


def _retype(spec: Any, random: Random) -> None:
    path = random.choice([path for path in places(spec) if path])
    old = _at(spec, path)
    _at(spec, path[:-1])[path[-1]] = random.choice([str(old), [old], {"value": old}, bool(old)])


SPOILERS: list[Callable[[Any, Random], None]] = [
    _replace,
    _replace,
    _remove,
    _add,
    _transplant,
    _repeat,
    _retype,
]


def _twice(text: str, random: Random) -> str:
    key = random.choice(["version", "model", "prompt"])
    return text[:-1] + f', "{key}": 1, "{key}": 1}}'


def _cut(text: str, random: Random) -> str:
    return text[: random.randrange(len(text))]


def _literal(text: str, random: Random) -> str:
    literal = random.choice(
        ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "01", "0x10", "1.", "undefined"]
    )
    return text[:-1] + f', "clip_skip": {literal}}}'


def _scramble(text: str, random: Random) -> bytes:
    data = bytearray(text.encode(errors="replace"))
    for _ in range(random.randrange(1, 5)):
        data[random.randrange(len(data))] = random.randrange(256)
    return bytes(data)


def _encode(text: str, random: Random) -> bytes:
    return text.encode(random.choice(["utf-16", "utf-32", "utf-8-sig", "latin-1"]), errors="replace")


def _deep(text: str, random: Random) -> str:
    depth = random.choice([100, 1000, 100_000])
    opening, closing = random.choice([("[", "]"), ('{"a":', "}"), ('{"from": "combine", "masks": [', "]}")])
    return text[:-1] + ', "mask": ' + opening * depth + "1" + closing * depth + "}"


TEXT_SPOILERS: list[Callable[[str, Random], str | bytes]] = [
    _twice,
    _cut,
    _literal,
    _scramble,
    _encode,
    _deep,
]


def spoiled(spec: dict[str, Any], seed: int) -> str | bytes | dict[str, Any]:
    """The spec with one to three things wrong, mostly; a text, bytes, or the object itself."""
    random = Random(seed)
    made = deepcopy(spec)
    for _ in range(random.randrange(4)):
        if made:
            with suppress(RecursionError):  # nested too deep for Python's own tools
                random.choice(SPOILERS)(made, random)
    if random.random() < 0.2:
        return made  # an object, as from Python
    try:
        text = json.dumps(made, ensure_ascii=random.random() < 0.5)
    except RecursionError:
        return made
    return random.choice(TEXT_SPOILERS)(text, random) if random.random() < 0.2 else text
