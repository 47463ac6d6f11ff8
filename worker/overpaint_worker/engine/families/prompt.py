r"""Prompts: from "a (red:1.3) hat" to blocks of 77 weighted tokens. Knows no torch.

Syntax: `(words)` weighs words by 1.1 and `(words:1.3)` by 1.3; parentheses nest, a number stands for itself
and a bare pair multiplies what surrounds it by 1.1; `\(` and `\)` are plain parentheses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from overpaint_shared.errors import JobError

BLOCK: Final = 77
"""Tokens that a CLIP encoder reads at once."""
BARE_PAIR: Final = 1.1
UNCUT_BELOW: Final = 8
"""A stretch of one weight with fewer tokens than this is not cut by the end of a block."""
DEEPEST: Final = 64
"""Nested parentheses that are read; 64 bare pairs weigh 1.1^64 = 446 already."""

_SYMBOL = re.compile(r"\\[()]|.", re.DOTALL)
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Words of one weight."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Block:
    """One reading of the encoder: `BLOCK` token ids and their weights, start, end and padding included."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Marks:
    """The ids that frame a block. CLIP-L pads with the end, OpenCLIP with 0."""

    start: int
    end: int
    pad: int


def stretches(prompt: str) -> list[Stretch]:
    """The prompt's words with their weights, in order. Parentheses that do not pair are plain text.

    Raises `JobError`: parentheses nest deeper than `DEEPEST`.
    """
    return list(_weighted(_SYMBOL.findall(prompt), 1.0, 0))


def _weighted(symbols: Sequence[str], weight: float, depth: int) -> Iterator[Stretch]:
    if depth > DEEPEST:
        raise JobError(
            f"parentheses nest more than {DEEPEST} deep",
            field="prompt", fix="write a weight as a number, (words:1.3)",
        )  # fmt: skip
    for piece in _pieces(symbols):
        if len(piece) >= 2 and piece[0] == "(" and piece[-1] == ")":
            inner, inner_weight = _explicit(piece[1:-1], weight)
            yield from _weighted(inner, inner_weight, depth + 1)
        elif piece:
            yield Stretch("".join(symbol[-1] for symbol in piece), weight)


def _pieces(symbols: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut before every outermost "(" and after the ")" that closes it."""
    depth = start = 0
    for i, symbol in enumerate(symbols):
        if symbol == "(":
            if depth == 0:
                yield symbols[start:i]
                start = i
            depth += 1
        elif symbol == ")":
            depth -= 1
            if depth == 0:
                yield symbols[start : i + 1]
                start = i + 1
    yield symbols[start:]


def _explicit(inner: Sequence[str], weight: float) -> tuple[Sequence[str], float]:
    """Split `words:1.3`; without a number that is finite, all of it is words, at a bare pair's weight."""
    colon = max((i for i, symbol in enumerate(inner) if symbol == ":"), default=0)
    number = "".join(inner[colon + 1 :])
    if colon > 0 and _NUMBER.fullmatch(number) and math.isfinite(float(number)):
        return inner[:colon], float(number)
    return inner, weight * BARE_PAIR


def blocks(prompt: str, tokenize: Callable[[str], Sequence[int]], marks: Marks) -> list[Block]:
    """The prompt as one block or more of `BLOCK` tokens, 75 of them the prompt's.

    `tokenize`: words to ids, without start and end. Each stretch is tokenized by itself.
    """
    rows: list[list[tuple[int, float]]] = [[]]
    for stretch in stretches(prompt):
        _append(rows, [(token, stretch.weight) for token in tokenize(stretch.text)])
    return [_framed(row, marks) for row in rows]


def _append(rows: list[list[tuple[int, float]]], tokens: list[tuple[int, float]]) -> None:
    room = BLOCK - 2
    cut = len(tokens) >= UNCUT_BELOW
    while tokens:
        left = room - len(rows[-1])
        taken = len(tokens) if len(tokens) <= left else left if cut else 0
        rows[-1] += tokens[:taken]
        tokens = tokens[taken:]
        if tokens:
            rows.append([])


def _framed(row: list[tuple[int, float]], marks: Marks) -> Block:
    padding = BLOCK - 2 - len(row)
    ids = [marks.start, *(token for token, _ in row), marks.end, *[marks.pad] * padding]
    weights = [1.0, *(weight for _, weight in row), 1.0, *[1.0] * padding]
    return Block(tuple(ids), tuple(weights))
