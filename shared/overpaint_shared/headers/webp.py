"""WebP (RFC 9649): chunks of a kind, a length and data in a RIFF file, the first of which has the size."""

import struct
from typing import Final

from overpaint_shared.headers.header import Header, at_most

MOST_CHUNKS: Final = 4096
_ALPHA: Final = 0x10


def read(data: bytes, max_frames: int) -> Header | None:
    """None: it does not begin as a WebP does. Raises `Costly`."""
    size = _size(data)
    if size is None:
        return None
    width, height, channels = size
    return Header(
        format="WEBP", width=width, height=height, channels=channels, frames=_frames(data, max_frames)
    )


def _size(data: bytes) -> tuple[int, int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        flags, width, height = data[20], data[24:27], data[27:30]
        return _number(width) + 1, _number(height) + 1, 4 if flags & _ALPHA else 3
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 4
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, 3
    return None


def _number(three: bytes) -> int:
    if len(three) < 3:
        raise IndexError
    return int.from_bytes(three, "little")


def _frames(data: bytes, max_frames: int) -> int:
    """Frames of an animation, counted up to one more than `max_frames`; 1 for a still picture."""
    at, frames, count = 12, 0, 0
    while at + 8 <= len(data) and frames <= max_frames:
        kind, length = struct.unpack_from("<4sI", data, at)
        frames += kind == b"ANMF"
        count += 1
        at_most(MOST_CHUNKS, count, "chunks")
        at += 8 + length + length % 2
    return max(frames, 1)
