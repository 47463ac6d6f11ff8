"""TIFF 6 and BigTIFF: directories of entries, one for each frame, and each with the place of the next."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from overpaint_shared.headers.header import Header, at_most

STARTS: Final = (b"MM\0*", b"II*\0", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")
MOST_ENTRIES: Final = 1024
MOST_NUMBERS: Final = 2**18
"""Numbers in a directory: mostly where strips and tiles lie. The largest picture has 65,535 rows."""
MOST_TEXT: Final = 16 * 2**20
"""Bytes of texts, profiles and previews in a directory."""

_WIDTH, _HEIGHT, _BITS, _SAMPLES = _WANTED = 256, 257, 258, 277
_SIZES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Bytes of each type of value; what has another type is passed over."""
_CODES: Final = {1: "B", 3: "H", 4: "I", 16: "Q"}


@dataclass(frozen=True)
class _Layout:
    """How the file writes its numbers."""

    order: str
    big: bool

    @property
    def head(self) -> str:
        """Of a directory: how many entries there are."""
        return f"{self.order}{'Q' if self.big else 'H'}"

    @property
    def entry(self) -> str:
        return f"{self.order}HH{'Q8s' if self.big else 'I4s'}"

    @property
    def place(self) -> str:
        return f"{self.order}{'Q' if self.big else 'I'}"


def read(data: bytes, max_frames: int) -> Header | None:
    """None: its first directory lacks a size. Raises `Costly`."""
    layout = _Layout("<" if data.startswith(b"II") else ">", big=data[2] == 43)
    (first,) = struct.unpack_from(layout.place, data, 8 if layout.big else 4)
    values = _directory(data, first, layout)
    width, height = values.get(_WIDTH), values.get(_HEIGHT)
    if not width or not height:
        return None
    return Header(
        format="TIFF",
        width=width,
        height=height,
        frames=_frames(data, first, layout, max_frames),
        channels=min(max(values.get(_SAMPLES, 1), 1), 4),
        depth=16 if values.get(_BITS, 1) > 8 else 8,
    )


def _directory(data: bytes, at: int, layout: _Layout) -> Mapping[int, int]:
    """The first number of each entry that is wanted, by its tag; of two for a tag the first counts."""
    (count,) = struct.unpack_from(layout.head, data, at)
    at_most(MOST_ENTRIES, count, "entries in a directory")
    at += struct.calcsize(layout.head)
    values: dict[int, int] = {}
    numbers = text = 0
    for index in range(count):
        tag, kind, length, raw = struct.unpack_from(
            layout.entry, data, at + index * struct.calcsize(layout.entry)
        )
        size = _SIZES.get(kind, 0) * length
        numbers += length if _SIZES.get(kind, 1) > 1 else 0
        text += size if _SIZES.get(kind, 0) == 1 else 0
        at_most(MOST_NUMBERS, numbers, "numbers in a directory", "save it again, with larger strips or tiles")
        at_most(MOST_TEXT, text, "bytes of metadata")
        if tag in _WANTED and kind in _CODES and length:
            values.setdefault(tag, _number(data, kind, size, raw, layout))
    return values


def _number(data: bytes, kind: int, size: int, raw: bytes, layout: _Layout) -> int:
    place = 0
    if size > len(raw):
        (place,) = struct.unpack(layout.place, raw)
        raw = data
    (value,) = struct.unpack_from(f"{layout.order}{_CODES[kind]}", raw, place)
    return int(value)


def _frames(data: bytes, at: int, layout: _Layout, max_frames: int) -> int:
    """Directories that lead on from the first, up to one more than `max_frames`; a ring ends."""
    seen: set[int] = set()
    while at and at not in seen and len(seen) <= max_frames:
        seen.add(at)
        at = _next(data, at, layout)
    return len(seen)


def _next(data: bytes, at: int, layout: _Layout) -> int:
    try:
        (count,) = struct.unpack_from(layout.head, data, at)
        behind = at + struct.calcsize(layout.head) + count * struct.calcsize(layout.entry)
        following: int = struct.unpack_from(layout.place, data, behind)[0]
    except (struct.error, OverflowError):  # it leads out of the file
        return 0
    return following
