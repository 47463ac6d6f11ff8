r"""Prompts: from "a (red:1.3) hat" to blocks of 77 weighted tokens. Knows no torch.

Syntax: `(words)` weighs words by 1.1 and `(words:1.3)` by 1.3; parentheses nest, a number stands for itself
and a bare pair multiplies what surrounds it by 1.1; `\(` and `\)` are plain parentheses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from overpaint_shared.errors import JobError

BLOCK: Final = 77
"""Tokens that a CLIP encoder reads at once."""
BARE_PAIR: Final = 1.1
UNCUT_BELOW: Final = 8
"""A stretch of one weight with fewer tokens than this is not cut by the end of a block."""
DEEPEST: Final = 64
"""Nested parentheses that are read; 64 bare pairs weigh 1.1^64 = 446 already."""
KEPT: Final = 16
"""Prompts that stay read: a few jobs' worth."""
MOST_BLOCKS: Final = 128
"""Blocks of one prompt: 9,600 tokens, twice what 20,000 characters of a plain language come to."""

_SYMBOL = re.compile(r"\\[()]|.", re.DOTALL)
_STOPS: Final = frozenset(":()")
_NUMBER = re.compile(r"\s*+[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?\s*+")
"""Gives nothing back once it is read: a number of thousands of digits takes no longer than its length."""


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


@lru_cache(maxsize=KEPT)
def stretches(prompt: str) -> tuple[Stretch, ...]:
    """The prompt's words with their weights, in order. Parentheses that do not pair are plain text.

    Takes time in proportion to the prompt's length. The last prompts are kept, so that a job's are read once:
    on a CPU thread, while its pictures are prepared.

    Raises `JobError`: parentheses nest deeper than `DEEPEST`.
    """
    reader = _Reader(_SYMBOL.findall(prompt))
    reader.level(0, len(reader.symbols), 1.0, 0)
    return tuple(reader.found)


class _Reader:
    """Reads a prompt from left to right; each symbol is looked at in the one group that it stands in."""

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = symbols
        self.found: list[Stretch] = []
        self._ends = _ends(symbols)

    def level(self, start: int, end: int, weight: float, depth: int) -> None:
        """Read what stands between `start` and `end`, of one weight but for the groups inside."""
        if depth > DEEPEST:
            raise JobError(
                f"parentheses nest more than {DEEPEST} deep",
                field="prompt", fix="write a weight as a number, (words:1.3)",
            )  # fmt: skip
        at = text = start
        while at < end:
            if at not in self._ends:
                at += 1
                continue
            self._words(text, at, weight)
            close = self._close(at, end)
            if close is None:
                self._words(at, end, weight)
                return
            self._group(at + 1, close, weight, depth)
            at = text = close + 1
        self._words(text, end, weight)

    def _close(self, at: int, end: int) -> int | None:
        """Where the group ends that begins at `at`.

        One that stays open ends with the last symbol if that is a ")"; else it is plain text.
        """
        if (close := self._ends[at]) < end:
            return close
        return end - 1 if self.symbols[end - 1] == ")" else None

    def _group(self, start: int, end: int, weight: float, depth: int) -> None:
        """Read `words:1.3`; without a number that is finite, all of it is words, at a bare pair's weight."""
        colon = end - 1
        while colon > start and self.symbols[colon] not in _STOPS:
            colon -= 1
        number = "".join(self.symbols[colon + 1 : end])
        if colon > start and self.symbols[colon] == ":" and _is_finite(number):
            self.level(start, colon, float(number), depth + 1)
        else:
            self.level(start, end, weight * BARE_PAIR, depth + 1)

    def _words(self, start: int, end: int, weight: float) -> None:
        if start < end:
            text = "".join(symbol[-1] for symbol in self.symbols[start:end])
            self.found.append(Stretch(text, weight))


def _ends(symbols: Sequence[str]) -> dict[int, int]:
    """For the place of each "(" that begins a group the place of its ")".

    It is the text's end for a group that stays open. A ")" without a partner is plain text, and so is the
    next "(" that stands in no group.
    """
    ends: dict[int, int] = {}
    opened: list[int] = []
    surplus = 0
    for at, symbol in enumerate(symbols):
        if symbol == "(" and (opened or not surplus):
            opened.append(at)
            ends[at] = len(symbols)
        elif symbol == "(":
            surplus -= 1
        elif symbol == ")" and opened:
            ends[opened.pop()] = at
        elif symbol == ")":
            surplus += 1
    return ends


def _is_finite(number: str) -> bool:
    return _NUMBER.fullmatch(number) is not None and math.isfinite(float(number))


def blocks(prompt: str, tokenize: Callable[[str], Sequence[int]], marks: Marks) -> list[Block]:
    """The prompt as one block or more of `BLOCK` tokens, 75 of them the prompt's.

    `tokenize`: words to ids, without start and end. Each stretch is tokenized by itself.

    Raises `JobError`: as `stretches`, or there are more than `MOST_BLOCKS`.
    """
    rows: list[list[tuple[int, float]]] = [[]]
    for stretch in stretches(prompt):
        _append(rows, [(token, stretch.weight) for token in tokenize(stretch.text)])
        if len(rows) > MOST_BLOCKS:
            raise JobError(
                f"the prompt has more than {MOST_BLOCKS * (BLOCK - 2)} tokens",
                field="prompt", value=prompt, fix="use fewer words",
            )  # fmt: skip
    return [_framed(row, marks) for row in rows]


def _append(rows: list[list[tuple[int, float]]], tokens: list[tuple[int, float]]) -> None:
    room = BLOCK - 2
    cut = len(tokens) >= UNCUT_BELOW
    done = 0
    while done < len(tokens):
        left, wanted = room - len(rows[-1]), len(tokens) - done
        taken = wanted if wanted <= left else left if cut else 0
        rows[-1] += tokens[done : done + taken]
        done += taken
        if done < len(tokens):
            rows.append([])


def _framed(row: list[tuple[int, float]], marks: Marks) -> Block:
    padding = BLOCK - 2 - len(row)
    ids = [marks.start, *(token for token, _ in row), marks.end, *[marks.pad] * padding]
    weights = [1.0, *(weight for _, weight in row), 1.0, *[1.0] * padding]
    return Block(tuple(ids), tuple(weights))
