"""PNG (third edition): a signature, then chunks of a length, a kind, data and a checksum."""

import struct
from collections.abc import Iterator
from typing import Final

from overpaint_shared.headers.header import Header, at_most

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
MOST_CHUNKS: Final = 65_536
"""Writers cut the pixels into pieces of 8 KiB and more: the largest file that is taken has 8,192 of those."""
MOST_PACKED: Final = 64
"""Profiles and texts that a reader unpacks, each to as much as a megabyte."""
_PACKED: Final = (b"zTXt", b"iTXt", b"iCCP")
_CHANNELS: Final = {0: 1, 2: 3, 3: 4, 4: 2, 6: 4}
"""By colour type; a palette is unpacked, perhaps with transparency."""


def read(data: bytes, max_frames: int) -> Header | None:
    """None: it does not begin as a PNG does. Raises `Costly`."""
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if colour not in _CHANNELS:
        return None
    frames, packed = 1, 0
    for count, (kind, at) in enumerate(_chunks(data), start=1):
        at_most(MOST_CHUNKS, count, "chunks")
        packed += kind in _PACKED
        at_most(MOST_PACKED, packed, "packed texts and profiles")
        if kind == b"acTL":
            frames = max(frames, min(struct.unpack_from(">I", data, at)[0], max_frames + 1))
    depth = 16 if bits == 16 else 8
    return Header(
        format="PNG", width=width, height=height, frames=frames, channels=_CHANNELS[colour], depth=depth
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each chunk's kind and where its data begin, up to the end of the picture or of the file."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8
        if kind == b"IEND":
            return
        at += 12 + length
