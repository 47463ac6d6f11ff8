"""Makers of awkward picture files, written from the formats' definitions, not with the code under test."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

D50 = np.array([0.9642, 1.0, 0.8249])


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png16(samples: np.ndarray, *extra: bytes, filters: bool = False) -> bytes:
    """A 16-bit PNG of uint16 [H, W, 1..4]; with `filters`, the rows take PNG's five filters in turn."""
    height, width, channels = samples.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = [np.frombuffer(row.astype(">u2").tobytes(), np.uint8).astype(int) for row in samples]
    body = b""
    above = np.zeros(width * channels * 2, int)
    for index, row in enumerate(rows):
        kind = index % 5 if filters else 0
        left = np.concatenate([np.zeros(channels * 2, int), row[: -channels * 2]])
        corner = np.concatenate([np.zeros(channels * 2, int), above[: -channels * 2]])
        estimate = left + above - corner
        near = np.stack([abs(estimate - left), abs(estimate - above), abs(estimate - corner)]).argmin(0)
        paeth = np.choose(near, [left, above, corner])
        predicted = [np.zeros_like(row), left, above, (left + above) // 2, paeth][kind]
        body += bytes([kind]) + ((row - predicted) % 256).astype(np.uint8).tobytes()
        above = row
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _s15(values: np.ndarray | list[float]) -> bytes:
    return b"".join(struct.pack(">i", round(float(v) * 65536)) for v in np.ravel(values))


def xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _s15(values)


def gamma_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def sampled_curve(values: np.ndarray) -> bytes:
    levels = np.rint(values * 65535).astype(">u2")
    data = b"curv\0\0\0\0" + struct.pack(">I", len(levels)) + levels.tobytes()
    return data + b"\0" * (-len(data) % 4)


def parametric_curve(kind: int, *values: float) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + _s15(list(values))


def icc(tags: dict[bytes, bytes], space: bytes = b"RGB ", kind: bytes = b"mntr") -> bytes:
    """A version 2 profile (4 where a curve is parametric) with the XYZ connection space."""
    describe = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78 + b"\0"
    tags = {b"desc": describe, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz(D50)} | tags
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    version = b"\x04\x00\0\0" if any(data[:4] == b"para" for data in tags.values()) else b"\x02\x10\0\0"
    head = struct.pack(
        ">I4s4s4s4s4s12s4s", start + len(body), b"test", version, kind, space, b"XYZ ", b"\0" * 12, b"acsp"
    )
    return head.ljust(68, b"\0") + _s15(D50).ljust(60, b"\0") + table + body


def primaries(*chromaticities: tuple[float, float]) -> np.ndarray:
    """Columns of XYZ for three primaries, scaled so that their sum is D50 (as if they had been adapted)."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in chromaticities]).T
    return columns * np.linalg.solve(columns, D50)


WIDE = primaries((0.72, 0.28), (0.17, 0.75), (0.13, 0.06))
SMALL = primaries((0.61, 0.34), (0.31, 0.56), (0.17, 0.10))


def matrix_icc(columns: np.ndarray, curve: bytes, **more: bytes) -> bytes:
    tags = {name: xyz(columns[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return icc(tags | {key.encode(): value for key, value in more.items()})


def table_icc(columns: np.ndarray, gamma: float, *, back: bool) -> bytes:
    """The same kind of space said with lookup tables: curves around a cube of two steps, which is linear."""
    corners = np.array([[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)])
    curve = np.rint(np.linspace(0, 1, 1024) ** gamma * 65535)
    root = np.rint(np.linspace(0, 1, 4096) ** (1 / gamma) * 65535)
    line = np.array([0, 65535])

    def table(matrix: np.ndarray, before: np.ndarray, cube: np.ndarray, after: np.ndarray) -> bytes:
        head = (
            b"mft2\0\0\0\0" + bytes([3, 3, 2, 0]) + _s15(matrix) + struct.pack(">HH", len(before), len(after))
        )
        parts = np.concatenate([np.tile(before, 3), cube.ravel(), np.tile(after, 3)])
        return head + np.clip(parts, 0, 65535).astype(">u2").tobytes()

    tags = {b"A2B0": table(np.eye(3), curve, np.rint(corners @ columns.T * 32768), line)}
    if back:
        tags[b"B2A0"] = table(np.linalg.inv(columns) * 65535 / 32768, line, corners * 65535, root)
    return icc(tags, kind=b"mntr" if back else b"scnr")
