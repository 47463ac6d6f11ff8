"""Of what the Lua scripts share, the part that one of them needs.

Redis runs a script from its first line at each call, so each definition costs time there whether it is used
or not: it makes a function or a table, which is garbage soon after. So a script is given those alone whose
names it mentions, itself or through others.

A definition begins with `local` at the beginning of a line. Other statements belong to the one before them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

_BEGIN: Final = re.compile(r"^(?=local\b)", re.MULTILINE)
_DEFINED: Final = re.compile(r"local (?:function )?([\w, ]+)")
_COMMENT: Final = re.compile(r"(?:^|\s+)--.*$", re.MULTILINE)
_NAME: Final = re.compile(r"(?<![\w.:])[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Definition:
    """One `local` statement of the top level."""

    text: str
    names: frozenset[str]
    """What it defines."""
    mentions: frozenset[str]


def definitions(library: str) -> tuple[Definition, ...]:
    """Those of a text, in order, without their comments."""
    return tuple(_definitions(_COMMENT.sub("", library)))


def _definitions(code: str) -> Iterator[Definition]:
    for text in _BEGIN.split(code):
        if found := _DEFINED.match(text):
            names = frozenset(found[1].replace(",", " ").split())
            yield Definition(text.strip(), names, _mentioned(text))


def _mentioned(code: str) -> frozenset[str]:
    return frozenset(_NAME.findall(code))


def needed(script: str, library: Sequence[Definition]) -> list[str]:
    """The texts of the definitions that a script needs, in the order of the library."""
    wanted, taken = _mentioned(_COMMENT.sub("", script)), set[int]()
    for place in reversed(range(len(library))):  # each mentions only those before it
        if wanted & library[place].names:
            wanted |= library[place].mentions
            taken.add(place)
    return [library[place].text for place in sorted(taken)]
