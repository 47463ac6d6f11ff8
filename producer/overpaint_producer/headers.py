"""How large a picture file is, from its header: nothing is decoded, and no error is made of what is wrong."""

import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS: Final = ("PNG", "JPEG", "WEBP", "TIFF")
"""What a worker reads."""
_ORIENTATION: Final = 274
_TURNED: Final = (5, 6, 7, 8)
"""Orientations that swap width and height."""


def upright_size(picture: "Image") -> tuple[int, int]:
    """(width, height) of an opened picture once it is turned as its EXIF data says."""
    width, height = picture.size
    # Pillow turns a TIFF's size itself. A PNG's EXIF data may follow its pixels; those in front are seen.
    if picture.format == "TIFF" or "exif" not in picture.info:
        return width, height
    try:
        turned = picture.getexif().get(_ORIENTATION) in _TURNED
    except Exception:  # a camera's broken EXIF; the worker takes the picture as upright, too
        turned = False
    return (height, width) if turned else (width, height)


def size_of(path: Path) -> tuple[int, int] | None:
    """(width, height) of a local picture, upright; None for what is not there or is no picture."""
    from PIL import Image

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit on pixels: nothing is decoded here
            with Image.open(path, formats=FORMATS) as picture:
                return upright_size(picture)
    except (
        Exception
    ):  # Pillow raises what its format readers raise; whoever uploads the file says what is wrong
        return None
