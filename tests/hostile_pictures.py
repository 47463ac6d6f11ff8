"""Small files that cost much to read: each kind of thing that a picture file may have too many of."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 8, height: int = 8, pixels: bytes | None = None) -> bytes:
    """A grey PNG with these chunks before its pixels."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width + 1) * height)) if pixels is None else pixels
    return SIGNATURE + head + b"".join(chunks) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def jpeg(side: int = 64, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("L", (side, side), 90).save(out, "JPEG", **options)
    return out.getvalue()


def jpeg_scans(count: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan is repeated: each costs a pass over all blocks."""
    data = jpeg(side, progressive=True, quality=10)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def jpeg_segments(segment: bytes, count: int) -> bytes:
    """A JPEG with a segment (its marker included) many times before its picture."""
    data = jpeg()
    return data[:2] + segment * count + data[2:]


def jpeg_exif(count: int) -> bytes:
    """EXIF in so many pieces, which readers lay end to end."""
    piece = b"Exif\0\0" + bytes(65_000)
    return jpeg_segments(b"\xff\xe1" + struct.pack(">H", len(piece) + 2) + piece, count)


def tiff(*entries: tuple[int, int, int, int], chain: int = 0) -> bytes:
    """A grey TIFF with further entries, and `chain` tiny directories behind its own."""
    strip = bytes(64 * 64)
    own = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
           (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 64), (279, 4, 1, 4096)]  # fmt: skip
    every = [*own, *entries]
    at = 8 + len(strip)
    table = struct.pack("<H", len(every)) + b"".join(struct.pack("<HHII", *entry) for entry in every)
    first = at + len(table) + 4
    out = bytearray(b"II*\0" + struct.pack("<I", at) + strip + table)
    out += struct.pack("<I", first if chain else 0)
    tiny = struct.pack("<H", 3) + b"".join(
        struct.pack("<HHII", *entry) for entry in ((256, 4, 1, 64), (257, 4, 1, 64), (273, 4, 1, 8))
    )
    for i in range(chain):
        following = first + (len(tiny) + 4) * (i + 1) if i < chain - 1 else 0
        out += tiny + struct.pack("<I", following)
    return bytes(out)


def webp_frames(count: int) -> bytes:
    """An animation whose frames are empty."""
    head = struct.pack("<4sI", b"VP8X", 10) + bytes([2]) + bytes(3) + bytes([7, 0, 0, 7, 0, 0])
    loop = struct.pack("<4sI", b"ANIM", 6) + bytes(6)
    frames = (struct.pack("<4sI", b"ANMF", 16) + bytes(16)) * count
    body = b"WEBP" + head + loop + frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


COSTLY: dict[str, Callable[[], bytes]] = {
    "scans of a JPEG": lambda: jpeg_scans(2000),
    "segments of a JPEG": lambda: jpeg_segments(b"\xff\xfe\0\2", 20_000),
    "restarts before a JPEG's picture": lambda: jpeg_segments(b"\xff\xd0", 20_000),
    "extensions of a JPEG": lambda: jpeg_segments(b"\xff\xf0", 20_000),
    "junk in a JPEG": lambda: jpeg_segments(b"\xff\xfe\0\2" + bytes(200_000), 1),
    "filling of a JPEG": lambda: jpeg_segments(b"\xff", 200_000),
    "EXIF of a JPEG": lambda: jpeg_exif(100),
    "chunks of a PNG": lambda: png(png_chunk(b"teSt", b"") * 70_000),
    "profiles of a PNG": lambda: png(png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(900_000))) * 80),
    "packed texts of a PNG": lambda: png(png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000))) * 80),
    "packed words of a PNG": lambda: png(
        png_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(900_000))) * 80),
    "frames of a PNG": lambda: png(png_chunk(b"acTL", struct.pack(">II", 50_000, 0))),
    "frames of a WebP": lambda: webp_frames(30_000),
    "chunks of a WebP": lambda: webp_frames(0) + struct.pack("<4sI", b"TEST", 0) * 30_000,
    "directories of a TIFF": lambda: tiff(chain=40_000),
    "entries of a TIFF": lambda: tiff(*[(40_000 + n % 20_000, 3, 1, 1) for n in range(30_000)]),
    "strips of a TIFF": lambda: tiff((324, 4, 2**20, 8)),
    "texts of a TIFF": lambda: tiff(*[(700 + n, 1, 2**22, 8) for n in range(9)]),
    "pixels of a PNG": lambda: png(width=60_000, height=60_000, pixels=b""),
    "pixels of a WebP": lambda: webp_frames(0).replace(bytes([7, 0, 0, 7, 0, 0]), b"\xff\x3f\0\xff\x3f\0"),
}  # fmt: skip
"""By what there is too much of."""
