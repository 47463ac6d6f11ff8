"""The world that the miniature models are trained in: captioned scenes of colour emoji with exact masks.

A scene is one to three objects of 32 kinds on a shaded, sometimes patterned ground of one of ten colours.
Everything follows from the scene's number: the same number is the same scene on every machine with the same
font file and the same Pillow.
"""

from __future__ import annotations

import functools
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

DEBIAN_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"  # package fonts-noto-color-emoji
FONT = Path(os.environ.get("OVERPAINT_EMOJI_FONT", DEBIAN_FONT))
FONT_SIZE = 109  # the one size that the font's bitmaps have, in pixels
SIZE = 256  # a scene's side, in pixels

OBJECTS = {
    "apple": "🍎", "banana": "🍌", "pizza": "🍕", "strawberry": "🍓", "cat": "🐱", "dog": "🐶",
    "frog": "🐸", "panda": "🐼", "fox": "🦊", "pig": "🐷", "star": "⭐", "heart": "❤",
    "rocket": "🚀", "car": "🚗", "sunflower": "🌻", "tree": "🌳", "ball": "⚽", "balloon": "🎈",
    "hat": "🎩", "mushroom": "🍄", "cactus": "🌵", "moon": "🌙", "fish": "🐠", "crown": "👑",
    "lemon": "🍋", "owl": "🦉", "butterfly": "🦋", "robot": "🤖", "lion": "🦁", "pumpkin": "🎃",
    "guitar": "🎸", "house": "🏠",
}  # fmt: skip
GROUNDS = {
    "white": (240, 240, 238), "gray": (128, 130, 134), "black": (28, 28, 32), "red": (186, 52, 48),
    "orange": (232, 146, 60), "yellow": (240, 212, 92), "green": (92, 158, 84), "blue": (74, 124, 196),
    "purple": (126, 84, 168), "pink": (236, 164, 188),
}  # fmt: skip
PATTERNS = ("plain", "plain", "plain", "stripes", "checks", "dots")

Rgb = tuple[int, int, int]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture [256, 256, 3], what is said of it, and where each object shows (0..255, [256, 256])."""

    pixels: Pixels
    caption: str
    ground: str
    masks: dict[str, Pixels]


def scene(number: int) -> Scene:
    """The scene of that number, 0 or more; training takes low ones, tests those from 1,000,000 on."""
    dice = random.Random(number)
    ground = dice.choice(list(GROUNDS))
    words = dice.sample(list(OBJECTS), dice.choices((1, 2, 3), (50, 42, 8))[0])
    picture = _ground(dice, GROUNDS[ground])
    masks: dict[str, Pixels] = {}
    for word, (x, y, side) in zip(words, _places(dice, len(words)), strict=True):
        glyph = _glyph(word).resize((side, side), Image.Resampling.LANCZOS)
        glyph = _turned(glyph, dice.uniform(-20, 20))
        masks = {w: _hidden(m, glyph, x, y) for w, m in masks.items()}
        masks[word] = _paste(picture, glyph, x, y)
    return Scene(pixels=np.asarray(picture), caption=caption(dice, words, ground), ground=ground, masks=masks)


def caption(dice: random.Random, words: list[str], ground: str) -> str:
    """One of several wordings for these objects, in any order, with or without the ground."""
    named = [article(word) for word in dice.sample(words, len(words))]
    things = named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]
    return dice.choice(
        (
            things,
            f"a picture of {things}",
            f"{things} on a {ground} background",
            f"{things} on a {ground} background",
            f"{things}, {ground} background",
            f"a {ground} background with {things}",
        )
    )


def article(word: str) -> str:
    """Say "an apple", "a dog"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


@functools.cache
def _glyph(word: str) -> Image.Image:
    """The emoji, cropped to what is drawn of it, centred on a transparent square."""
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    sheet = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(sheet).text(
        (FONT_SIZE // 2, FONT_SIZE // 2), OBJECTS[word], font=font, embedded_color=True
    )
    drawn = sheet.crop(sheet.getbbox())
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square


def _turned(glyph: Image.Image, degrees: float) -> Image.Image:
    """By premultiplied colours: else the black of transparent pixels would show along the edge."""
    turned = glyph.convert("RGBa").rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    return turned.convert("RGBA")


def _places(dice: random.Random, count: int) -> list[tuple[int, int, int]]:
    """Centres and sides of `count` objects, apart from one another where there is room for it."""
    sides = [dice.randint(*((104, 176), (88, 124), (72, 96))[count - 1]) for _ in range(count)]
    best: list[tuple[int, int, int]] = []
    best_gap = -float("inf")
    for _ in range(40):
        tried = [(dice.randint(s // 2, SIZE - s // 2), dice.randint(s // 2, SIZE - s // 2), s) for s in sides]
        gap = min((_gap(a, b) for i, a in enumerate(tried) for b in tried[:i]), default=1.0)
        if gap > best_gap:
            best, best_gap = tried, gap
        if gap > 0:
            break
    return best


def _gap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    return float(np.hypot(a[0] - b[0], a[1] - b[1])) - 0.48 * (a[2] + b[2])


def _ground(dice: random.Random, colour: Rgb) -> Image.Image:
    """A ground of about that colour: jittered, shaded along one direction, perhaps with a faint pattern."""
    base = np.array(colour, np.float32) + np.array([dice.uniform(-10, 10) for _ in range(3)], np.float32)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1) - 0.5
    angle = dice.uniform(0, 2 * np.pi)
    shade = (x * np.cos(angle) + y * np.sin(angle)) * dice.uniform(10, 40)
    field = base + shade[..., None] + _pattern(dice, x, y)[..., None]
    return Image.fromarray(field.clip(0, 255).astype(np.uint8))


def _pattern(dice: random.Random, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    kind, count, depth = dice.choice(PATTERNS), dice.randint(4, 8), dice.uniform(6, 12)
    waves = np.sin(np.pi * count * x), np.sin(np.pi * count * y)
    shape = {
        "plain": np.zeros_like(x),
        "stripes": np.tanh(6 * waves[dice.randint(0, 1)]),
        "checks": np.tanh(6 * waves[0] * waves[1]),
        "dots": np.tanh(8 * (waves[0] * waves[1] - 0.6)),
    }[kind]
    return (shape * depth).astype(np.float32)


def _paste(picture: Image.Image, glyph: Image.Image, x: int, y: int) -> Pixels:
    """Put the glyph's centre at (x, y), with a soft shadow below it; returns its coverage of the picture."""
    at = (x - glyph.width // 2, y - glyph.height // 2)
    shadow = glyph.getchannel("A").filter(ImageFilter.GaussianBlur(6)).point(lambda a: a * 0.28)
    picture.paste((0, 0, 0), (at[0] + 4, at[1] + 6), shadow)
    picture.paste(glyph, at, glyph)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(glyph.getchannel("A"), at)
    return np.asarray(mask)


def _hidden(mask: Pixels, glyph: Image.Image, x: int, y: int) -> Pixels:
    """What is still to be seen of an object when a later one covers part of it."""
    cover = Image.new("L", (SIZE, SIZE))
    cover.paste(glyph.getchannel("A"), (x - glyph.width // 2, y - glyph.height // 2))
    return (mask.astype(np.uint16) * (255 - np.asarray(cover).astype(np.uint16)) // 255).astype(np.uint8)
