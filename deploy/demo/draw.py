"""Draws the demo's picture, lake.png: python deploy/demo/draw.py. Free for any use (CC0-1.0).

Made for this project. Drawn four times as large as it is kept, in flat shapes and soft gradients; the same on
every machine.
"""

import math
import random
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

OUT = Path(__file__).parents[2] / "producer" / "overpaint_producer" / "demo" / "lake.png"
SIDE = 384
LARGE = 4 * SIDE
HORIZON = int(LARGE * 0.58)
SUN = (int(LARGE * 0.66), int(LARGE * 0.36), int(LARGE * 0.085))  # x, y, radius
MAT = 14 * 4  # a frame of grey card
GREY = (138, 134, 130)
Colour = tuple[int, int, int]


def blend(low: Colour, high: Colour, share: float) -> Colour:
    """`low` where share is 0, `high` where it is 1."""
    return tuple(round(a + (b - a) * share) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]


def gradient(stops: list[tuple[float, Colour]]) -> Image.Image:
    """A picture whose rows pass through `stops`: (share of the height, colour)."""
    column = Image.new("RGB", (1, LARGE))
    for y in range(LARGE):
        at = y / (LARGE - 1)
        above = max((stop for stop in stops if stop[0] <= at), key=lambda stop: stop[0])
        below = min((stop for stop in stops if stop[0] >= at), key=lambda stop: stop[0])
        span = below[0] - above[0]
        column.putpixel((0, y), blend(above[1], below[1], (at - above[0]) / span if span else 0.0))
    return column.resize((LARGE, LARGE))


def sky() -> Image.Image:
    """Dusk, with the sun and its glow."""
    night, violet, rose, gold = (27, 38, 84), (92, 72, 138), (226, 118, 108), (255, 206, 128)
    picture = gradient([(0.0, night), (0.25, violet), (0.45, rose), (0.58, gold), (1.0, gold)])
    x, y, radius = SUN
    glow = Image.new("RGB", picture.size)
    ImageDraw.Draw(glow).ellipse(
        [x - 3 * radius, y - 3 * radius, x + 3 * radius, y + 3 * radius], (110, 70, 30)
    )
    picture = ImageChops.add(picture, glow.filter(ImageFilter.GaussianBlur(radius)))
    ImageDraw.Draw(picture).ellipse([x - radius, y - radius, x + radius, y + radius], (255, 240, 196))
    return picture


def ridge(base: float, height: float, roughness: float, seed: int) -> list[tuple[int, int]]:
    """The outline of mountains, left to right and closed at the horizon: midpoint displacement."""
    dice = random.Random(seed)  # noqa: S311 - a drawing, no secret
    heights = [dice.uniform(0, 1), dice.uniform(0, 1), dice.uniform(0, 1)]
    spread = roughness
    for _ in range(6):
        halves = [(a + b) / 2 + dice.uniform(-spread, spread) for a, b in pairwise(heights)]
        heights = [h for pair in zip(heights, halves, strict=False) for h in pair] + heights[-1:]
        spread /= 2
    step = LARGE / (len(heights) - 1)
    outline = [(round(i * step), round(LARGE * (base - height * h))) for i, h in enumerate(heights)]
    return [(0, HORIZON), *outline, (LARGE, HORIZON)]


def land(picture: Image.Image) -> None:
    """Three ranges, paler with distance."""
    draw = ImageDraw.Draw(picture)
    draw.polygon(ridge(0.50, 0.20, 0.32, 5), (150, 96, 140))
    draw.polygon(ridge(0.54, 0.15, 0.30, 11), (96, 68, 118))
    draw.polygon(ridge(0.585, 0.09, 0.26, 23), (52, 46, 88))


def water(above: Image.Image) -> Image.Image:
    """The land and the sky upside down, darker and rippled, and the sun's path."""
    mirrored = above.crop((0, 2 * HORIZON - LARGE, LARGE, HORIZON)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    lake = ImageChops.multiply(mirrored, Image.new("RGB", mirrored.size, (168, 182, 214)))
    rippled = Image.new("RGB", lake.size)
    for y in range(lake.height):
        shift = round((2 + y / 40) * math.sin(y / (5 + y / 30)) * 2)
        rippled.paste(ImageChops.offset(lake.crop((0, y, LARGE, y + 1)), shift, 0), (0, y))
    dice = random.Random(3)  # noqa: S311 - a drawing, no secret
    draw = ImageDraw.Draw(rippled)
    for y in range(8, lake.height, 14):
        for _ in range(3):
            reach = 30 + y / 5
            x = SUN[0] + dice.gauss(0, reach)
            length = dice.uniform(20, 60 + y / 6)
            draw.rounded_rectangle([x - length, y, x + length, y + 5], 3, (255, 214, 150))
    return rippled


def boat(picture: Image.Image) -> None:
    """A sailing boat left of the middle, and its reflection."""
    draw = ImageDraw.Draw(picture)
    x, y, size = int(LARGE * 0.30), int(LARGE * 0.70), LARGE * 0.20
    sail = [
        (x + 0.04 * size, y - 1.55 * size),
        (x + 0.04 * size, y - 0.16 * size),
        (x + 0.80 * size, y - 0.16 * size),
    ]
    jib = [
        (x - 0.04 * size, y - 1.35 * size),
        (x - 0.04 * size, y - 0.16 * size),
        (x - 0.55 * size, y - 0.16 * size),
    ]
    hull = [
        (x - 0.70 * size, y - 0.10 * size),
        (x + 0.90 * size, y - 0.10 * size),
        (x + 0.60 * size, y + 0.16 * size),
        (x - 0.46 * size, y + 0.16 * size),
    ]
    for points, colour in ((sail, (196, 170, 178)), (jib, (206, 128, 118)), (hull, (34, 28, 52))):
        draw.polygon(
            [(px, 2 * y + 0.16 * size - py) for px, py in points], blend(colour, (96, 76, 120), 0.55)
        )
    draw.polygon(sail, (252, 244, 230))
    draw.polygon(jib, (232, 92, 74))
    draw.polygon(hull, (44, 30, 48))
    draw.line([(x, y - 1.6 * size), (x, y - 0.1 * size)], (44, 30, 48), 10)


def pines(picture: Image.Image) -> None:
    """Two dark firs in the foreground, at the right."""
    draw = ImageDraw.Draw(picture)
    for x, foot, height in ((0.90, 0.97, 0.62), (0.79, 1.0, 0.36)):
        middle, ground, tall = LARGE * x, LARGE * foot, LARGE * height
        for tier in range(6):
            top = ground - tall * (1 - tier * 0.14)
            half = tall * (0.06 + 0.035 * tier)
            draw.polygon(
                [(middle, top), (middle - half, top + tall * 0.26), (middle + half, top + tall * 0.26)],
                (18, 30, 44),
            )
        draw.rectangle([middle - 12, ground - tall * 0.1, middle + 12, ground + 60], (24, 20, 30))


def main() -> None:
    """Draw, frame, shrink and save."""
    picture = sky()
    land(picture)
    picture.paste(water(picture), (0, HORIZON))
    boat(picture)
    pines(picture)
    framed = Image.new("RGB", picture.size, GREY)
    inner = picture.resize((LARGE - 2 * MAT,) * 2, Image.Resampling.LANCZOS)
    framed.paste(inner, (MAT, MAT))
    framed.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
