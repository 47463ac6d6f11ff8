"""Sheets of small pictures in rows, with words beside and above them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 128
"""Of one picture on the sheet, pixels."""
GAP = 6
LABEL = 172
HEAD = 20
COLOURS = 256


def write(path: Path, rows: Mapping[str, Sequence[bytes]], heads: Sequence[str] = ()) -> None:
    """Write encoded pictures, one row for each label, under the heads of the columns.

    The sheet is a PNG with a palette: a third of the size, and nothing to be seen of it at this scale.
    """
    columns, head = max(len(row) for row in rows.values()), HEAD if heads else 0
    size = (LABEL + columns * (SIDE + GAP), head + len(rows) * (SIDE + GAP))
    sheet, pen = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    for x, words in enumerate(heads):
        draw.text((_left(x) + SIDE / 2, head / 2), words, "black", pen, anchor="mm")
    for y, (label, row) in enumerate(rows.items()):
        top = head + y * (SIDE + GAP)
        draw.multiline_text((8, top + SIDE / 2), label, "black", pen, anchor="lm")
        for x, picture in enumerate(row):
            sheet.paste(_small(picture), (_left(x), top))
    palette = sheet.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
    palette.save(path, optimize=True)


def _left(column: int) -> int:
    return LABEL + column * (SIDE + GAP)


def _small(picture: bytes) -> Image.Image:
    opened = Image.open(io.BytesIO(picture)).convert("RGB")
    return opened.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
