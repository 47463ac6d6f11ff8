"""Sixteen-bit colour in PNG, which Pillow's modes cannot hold: its decoder reads it in two passes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

Samples = NDArray[np.unsignedinteger[Any]]
"""Of 8 or of 16 bits a sample."""


def is_deep(image: Image.Image) -> bool:
    """Whether an opened, not yet loaded picture is a PNG of 16-bit RGB, RGBA or grey with alpha."""
    return _raw_mode(image) in {"RGB;16B", "RGBA;16B", "LA;16B"}


def _raw_mode(image: Image.Image) -> object:
    tiles = image.tile if isinstance(image, PngImagePlugin.PngImageFile) else []
    return tiles[0].args if tiles else None


def read(data: bytes) -> NDArray[np.uint16]:
    """Decode every bit of a picture for which `is_deep` holds, to uint16 [H, W, channels].

    Pillow's unpackers of 16-bit samples keep one byte of each. Told that the samples are little-endian they
    keep the other one. A pixel of grey with alpha has four bytes, as one of RGBA, and needs one pass.
    """
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        raw = _raw_mode(image)
    if raw == "LA;16B":
        pair = _decode(data, "RGBA")
        return _joined(pair[..., 0::2], pair[..., 1::2])
    return _joined(_decode(data, str(raw)), _decode(data, str(raw).replace("16B", "16L")))


def _joined(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return np.asarray(high.astype(np.uint16) << 8 | low, dtype=np.uint16)


def _decode(data: bytes, raw_mode: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        return np.asarray(image)
