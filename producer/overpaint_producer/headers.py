"""How large a picture file is, from its header: nothing is decoded, and no error is made of what is wrong."""

import warnings
from io import SEEK_CUR, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from overpaint_shared.files import read_picture_file
from overpaint_shared.headers import look
from overpaint_shared.job import reference_kind
from overpaint_shared.setting_views import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

    from overpaint_shared.job import JobSpec

FORMATS: Final = ("PNG", "JPEG", "WEBP", "TIFF")
"""What a worker reads."""
LARGEST_BYTES: Final = Limits.max_input_bytes
_ORIENTATION: Final = 274
_TURNED: Final = (5, 6, 7, 8)
"""Orientations that swap width and height."""
_METADATA: Final = (b"IHDR", b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""The chunks of a PNG that Pillow reads an orientation from; and the header."""
_LARGEST_CHUNK: Final = 1 << 24
_END_OF_PNG: Final = b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xae\x42\x60\x82"


def upright_size(picture: "Image") -> tuple[int, int]:
    """(width, height) of an opened picture once it is turned as its metadata says."""
    width, height = picture.size
    # Pillow turns a TIFF's size itself.
    turned = picture.format != "TIFF" and _orientation(picture) in _TURNED
    return (height, width) if turned else (width, height)


def _orientation(picture: "Image") -> object:
    from PIL import Image

    try:
        if picture.format == "PNG":
            with Image.open(BytesIO(_without_pixels(picture)), formats=("PNG",)) as bare:
                return Image.Image.getexif(bare).get(_ORIENTATION)  # PNG's own would load the pixels
        return picture.getexif().get(_ORIENTATION)
    except Exception:  # a camera's broken EXIF; the worker takes the picture as upright, too
        return None


def _without_pixels(picture: "Image") -> bytes:
    """The PNG with its header and metadata alone: some programs write those behind the pixels."""
    file = getattr(picture, "fp", None)
    if file is None:
        return b""
    file.seek(0)
    kept = [file.read(8)]
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length, kind = int.from_bytes(head[:4]), head[4:]
        if kind in _METADATA and length <= _LARGEST_CHUNK:
            kept.append(head + file.read(length + 4))
        else:
            file.seek(length + 4, SEEK_CUR)
    return b"".join([*kept, _END_OF_PNG])


def size_of(path: Path) -> tuple[int, int] | None:
    """(width, height) of a local picture, upright; None for what is not there or is no picture."""
    from PIL import Image

    try:
        data = read_picture_file(path, LARGEST_BYTES, "image", smaller="", found="")
        if look(data, "image") is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit on pixels: nothing is decoded here
            with Image.open(BytesIO(data), formats=FORMATS) as picture:
                return upright_size(picture)
    except (
        Exception
    ):  # Pillow raises what its format readers raise; whoever uploads the file says what is wrong
        return None


def sizes_of(spec: "JobSpec", folder: Path) -> dict[str, tuple[int, int]]:
    """`size_of` each picture of a job that is a file and can be read, by its reference in the job."""
    local = {name for _, name in spec.image_refs() if reference_kind(name) == "path"}
    sizes = {name: size_of(folder / name) for name in local}
    return {name: size for name, size in sizes.items() if size}
