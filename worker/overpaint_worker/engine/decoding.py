"""Encoded bytes to samples: the one place where a stranger's picture is decoded. Imports no torch.

What is refused is refused from the header, before anything is decoded: too many bytes, pixels or frames, and
formats that nobody needs here. See docs/pictures.md for the rules in words.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from overpaint_shared.errors import InputError, PictureTooCostly
from overpaint_shared.headers import Header, look
from overpaint_shared.settings import Limits

from . import deep_png
from .deep_png import Samples

FORMATS: Final = ("PNG", "JPEG", "WEBP", "TIFF")
"""Each opened by content; JPEG brings MPO, what many phones write."""
MAX_SIDE: Final = 65_535
BITS_PER_SAMPLE: Final = TiffImagePlugin.BITSPERSAMPLE
# Pillow's own limit is one for the whole process and knows no job; ours are checked before it would act.
Image.MAX_IMAGE_PIXELS = None

_UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a file holds.

    Attributes:
        samples: uint8 or uint16 [H, W, 1 to 4], upright.
        icc: its profile.
        notes: what a person should know, for the receipt.

    """

    samples: Samples
    icc: bytes | None
    notes: tuple[str, ...] = ()


class Decode(Protocol):
    """A way to decode a picture: in this process (`decode`), or in another."""

    def __call__(
        self, data: bytes, limits: Limits, field: str, *, compat: bool = False, drop_keyed: bool = True
    ) -> Decoded:
        """See `decode`."""


def decode(
    data: bytes, limits: Limits, field: str, *, compat: bool = False, drop_keyed: bool = True
) -> Decoded:
    """Decode a picture in this process.

    Args:
        data: an encoded PNG, JPEG, WebP or TIFF.
        limits: bytes, pixels and frames that the operator allows.
        field: where the job names this picture, for errors: "source.image".
        compat: as the reference reads it: eight bits, 16-bit grey saturated.
        drop_keyed: of the reference, whether one transparent colour is no transparency.

    Raises:
        InputError: not such a picture, broken, or beyond a limit.

    """
    if len(data) > limits.max_input_bytes:
        fix = f"use a smaller file; this farm takes up to {limits.max_input_bytes} bytes"
        raise InputError(f"the picture has {len(data)} bytes", field=field, value=len(data), fix=fix)
    header = look(data, field, max_frames=limits.max_frames)
    if header is None:
        raise _no_picture(data, field)
    _check_size(header.width, header.height, limits, field)
    _check_frames(header, limits, field)
    with _open(data, field) as image:
        _check_size(*image.size, limits, field)
        _check_mode(image, field, compat=compat)
        deep = deep_png.is_deep(image) and not compat
        try:
            image.load()
            notes, turn = _orientation(image)
            if deep:
                samples = _keyed_deep(deep_png.read(data), image)
            elif compat:
                samples = _reference(image, drop_keyed=drop_keyed)
            else:
                samples = _samples(image)
        except InputError:
            raise
        except MemoryError as error:
            fix = "open it in a picture editor and save it again as a PNG"
            message = "decoding the picture takes more memory than its pixels do"
            raise PictureTooCostly(message, field=field, fix=fix) from error
        except Exception as error:
            # Pillow's decoders raise a dozen kinds of error for broken bytes; each of them means just that.
            raise _broken(error, field) from error
        return Decoded(
            np.ascontiguousarray(_UPRIGHT[turn](samples)), image.info.get("icc_profile") or None, notes
        )


def _broken(error: Exception, field: str) -> InputError:
    fix = "the file is cut short or damaged; save or send it again"
    return InputError(f"the picture cannot be decoded: {error}", field=field, value=str(error), fix=fix)


def _open(data: bytes, field: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise _no_picture(data, field) from error
    except Exception as error:
        if "too large" in str(error):  # Pillow's refusal of text and profiles that inflate beyond 1 MB
            fix = "save the picture again without its metadata"
            message = "the picture carries a text or profile of more than 1 MB"
            raise InputError(message, field=field, fix=fix) from error
        raise _broken(error, field) from error


def _no_picture(data: bytes, field: str) -> InputError:
    message = "this is not a picture that can be read" if data else "the picture is empty"
    return InputError(message, field=field, value=data[:16].hex(), fix="use a PNG, JPEG, WebP or TIFF file")


def _check_size(width: int, height: int, limits: Limits, field: str) -> None:
    if width * height > limits.max_pixels or max(width, height) > MAX_SIDE:
        fix = f"scale it down first; this farm takes up to {limits.max_pixels} pixels and {MAX_SIDE} a side"
        raise InputError(
            f"the picture has {width} x {height} pixels", field=field, value=f"{width}x{height}", fix=fix
        )


def _check_frames(header: Header, limits: Limits, field: str) -> None:
    """Those of an MPO do not count: previews, and the other eye's view, behind the photograph."""
    if header.frames > limits.max_frames:
        fix = "save the one frame that is meant as a picture of its own"
        raise InputError(
            f"the picture has {header.frames} or more frames, {limits.max_frames} allowed",
            field=field,
            value=header.frames,
            fix=fix,
        )


def _check_mode(image: Image.Image, field: str, *, compat: bool) -> None:
    mode = image.mode
    reason = {
        "CMYK": "it is in CMYK, made for print",
        "LAB": "it is in Lab",
        "F": "its samples are floating-point numbers, which have no agreed white",
        "I": "its samples are 32-bit integers, which have no agreed white",
    }.get(mode)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and mode not in {"I;16", "I;16B", "I;16L", "I", "F"}:
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (1,))
        if max(bits) > 8:
            reason = reason or "it is a TIFF of more than 8 bits in colour, of which only 8 could be read"
    if reason is None or (compat and mode == "I"):
        return
    fix = "convert it to RGB and save it as PNG, with 16 bits where they matter"
    raise InputError(f"the picture cannot be used: {reason}", field=field, value=mode, fix=fix)


def _orientation(image: Image.Image) -> tuple[tuple[str, ...], int]:
    """Read after loading: Pillow turns a TIFF itself while it loads, and then drops the tag."""
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a camera's broken EXIF must not cost the picture
        return ("its EXIF data cannot be read; taken as upright",), 1
    return (
        ((), turn)
        if turn in _UPRIGHT
        else ((f"its EXIF orientation {turn!r} means nothing; taken as upright",), 1)
    )


def _samples(image: Image.Image) -> Samples:
    """All that the file holds, [H, W, 1 to 4]: grey, grey and alpha, RGB, RGBA."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16)[..., None]
        return _keyed_deep(grey, image)
    if image.mode in {"1", "L"} and not image.has_transparency_data:
        return np.asarray(image.convert("L"))[..., None]
    if image.mode in {"1", "L", "LA", "La"}:
        return np.asarray(image.convert("LA"))
    has_alpha = image.mode in {"RGBA", "RGBa", "PA"} or image.has_transparency_data
    mode = "RGBA" if has_alpha else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))


def _keyed_deep(samples: Samples, image: Image.Image) -> Samples:
    """Sixteen-bit samples with the one transparent colour of PNG's tRNS chunk as alpha."""
    key = image.info.get("transparency")
    if key is None or samples.shape[-1] in {2, 4}:
        return samples
    opaque = (samples != np.asarray(key)).any(axis=-1, keepdims=True)
    return np.concatenate([samples, opaque.astype(np.uint16) * 65535], axis=-1)


def _reference(image: Image.Image, *, drop_keyed: bool) -> Samples:
    """The reference's Load Image: eight bits of RGB, with alpha from an alpha band or a palette only."""
    if image.mode == "I":
        image = image.point(lambda value: value * (1 / 255))
    keyed = image.has_transparency_data and (image.mode == "P" or not drop_keyed)
    if "A" in image.getbands() or keyed:
        return np.asarray(image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))
