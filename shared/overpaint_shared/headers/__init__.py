"""What a picture file promises, from its own structure: nothing is decoded, and looking is bounded work.

A producer looks before it uploads, a worker before it decodes. What would cost far more than its pixels is
refused here: a file of kilobytes may hold thousands of scans, directories, frames or packed texts.
"""

import struct

from overpaint_shared.errors import PictureTooCostly
from overpaint_shared.headers import jpeg, png, tiff, webp
from overpaint_shared.headers.header import Costly, Header

__all__ = ["Header", "look"]


def look(data: bytes, field: str, name: str = "the picture", *, max_frames: int = 1) -> Header | None:
    """What the file promises; None for what is no PNG, JPEG, WebP or TIFF, or is broken in its first bytes.

    Frames are counted up to one more than `max_frames`. `field` is the place in the spec that names the
    picture, `name` what messages call it.

    Raises:
        PictureTooCostly: reading it would cost far more than its pixels.

    """
    try:
        return _read(data, max_frames)
    except Costly as costly:
        raise PictureTooCostly(
            f"{name} has {costly}", field=field, value=costly.value, fix=costly.fix
        ) from costly
    except (struct.error, IndexError, OverflowError):  # cut short, or it leads out of the file
        return None


def _read(data: bytes, max_frames: int) -> Header | None:
    if data.startswith(png.SIGNATURE):
        return png.read(data, max_frames)
    if data.startswith(jpeg.START):
        return jpeg.read(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return webp.read(data, max_frames)
    return tiff.read(data, max_frames) if data.startswith(tiff.STARTS) else None
