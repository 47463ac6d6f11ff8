"""A contact sheet: pictures in rows, each with its label."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

SIDE = 320
"""Longer side of a picture on the sheet, pixels."""
COLUMNS = 5
MARGIN = 24
LINE = 40
"""Height of a line of text."""
PAPER, INK = "#ffffff", "#1c1c1c"


@dataclass(frozen=True)
class Panel:
    """One picture, encoded, and what stands under it."""

    label: str
    picture: bytes


def contact_sheet(panels: Sequence[Panel], *, title: str) -> Image.Image:
    """The panels in rows of five under `title`. RGB."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // COLUMNS)
    size = (MARGIN + columns * (SIDE + MARGIN), MARGIN + LINE + rows * (SIDE + LINE + MARGIN))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, _font(24))
    for at, panel in enumerate(panels):
        row, column = divmod(at, COLUMNS)
        left, top = MARGIN + column * (SIDE + MARGIN), MARGIN + LINE + row * (SIDE + LINE + MARGIN)
        picture = _fitted(panel.picture)
        sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        draw.text((left + SIDE / 2, top + SIDE + 8), panel.label, INK, _font(20), anchor="ma")
    return sheet


def _fitted(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data)) as picture:
        rgb = picture.convert("RGB")
    scale = SIDE / max(rgb.size)
    size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    return rgb.resize(size, Image.Resampling.LANCZOS)


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow brings one: the same sheet on every machine
