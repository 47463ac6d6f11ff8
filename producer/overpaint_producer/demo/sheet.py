"""A contact sheet: pictures side by side, each with its label."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

SIDE = 384
"""Longer side of a picture on the sheet, pixels."""
MARGIN = 24
LINE = 40
"""Height of a line of text."""
PAPER, INK, FAINT = "#ffffff", "#1c1c1c", "#8a1f11"


@dataclass(frozen=True)
class Panel:
    """One picture, encoded, and what stands under it."""

    label: str
    picture: bytes


def contact_sheet(panels: Sequence[Panel], *, title: str, note: str = "") -> Image.Image:
    """The panels in one row under `title`, `note` below them in red. RGB."""
    width = MARGIN + len(panels) * (SIDE + MARGIN)
    height = MARGIN + LINE + SIDE + LINE + (LINE if note else 0) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, _font(24))
    top = MARGIN + LINE
    for at, panel in enumerate(panels):
        left = MARGIN + at * (SIDE + MARGIN)
        picture = _fitted(panel.picture)
        sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        draw.text((left + SIDE / 2, top + SIDE + 8), panel.label, INK, _font(22), anchor="ma")
    draw.text((MARGIN, top + SIDE + LINE + 8), note, FAINT, _font(20))
    return sheet


def _fitted(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data)) as picture:
        rgb = picture.convert("RGB")
    scale = SIDE / max(rgb.size)
    size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    return rgb.resize(size, Image.Resampling.LANCZOS)


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow brings one: the same sheet on every machine
