"""Encoded bytes to a picture to work on: upright, in sRGB, with its alpha, depth and profile kept.

What is refused is refused from the header, before anything is decoded: too many bytes, pixels or frames, and
formats that nobody needs here. See docs/pictures.md for the rules in words.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from overpaint_shared.errors import InputError, MaskError
from overpaint_shared.headers import Header, look
from overpaint_shared.settings import Limits

from . import colour, deep_png
from .deep_png import Samples

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")  # each opened by content; JPEG brings MPO, what many phones write
MAX_SIDE = 65_535
ALL = slice(None)
BITS_PER_SAMPLE = TiffImagePlugin.BITSPERSAMPLE
# Pillow's own limit is one for the whole process and knows no job; ours are checked before it would act.
Image.MAX_IMAGE_PIXELS = None

Channel = Literal["red", "green", "blue", "alpha"]

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
class Picture:
    """A decoded picture.

    Attributes:
        rgb: float32 [H, W, 3], 0..1, sRGB.
        alpha: float32 [H, W], 1 = opaque; None where the file has no transparency.
        icc: the profile that the result returns to; None for sRGB.
        depth: bits a sample, 8 or 16.
        samples: uint8 or uint16 [H, W, 3], the file's own values in the space of `icc`, for putting pixels
            back bit for bit; None where that space is left for good (grey profiles, scanner profiles).
        notes: what a person should know, for the receipt.

    """

    rgb: torch.Tensor
    alpha: torch.Tensor | None
    icc: bytes | None
    depth: Literal[8, 16]
    samples: Samples | None
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Pixels."""
        return self.rgb.shape[1]

    @property
    def height(self) -> int:
        """Pixels."""
        return self.rgb.shape[0]


def load(data: bytes, limits: Limits, field: str, *, compat: bool = False) -> Picture:
    """Decode a picture.

    Args:
        data: an encoded PNG, JPEG, WebP or TIFF.
        limits: bytes, pixels and frames that the operator allows.
        field: where the job names this picture, for errors: "source.image".
        compat: what the reference's Load Image does: profile ignored, eight bits, 16-bit grey saturated.

    Raises:
        InputError: not such a picture, broken, or beyond a limit.

    """
    decoded = _decode(data, limits, field, compat=compat)
    rgb, alpha = _split(decoded.samples)
    depth: Literal[8, 16] = 16 if decoded.samples.dtype == np.uint16 else 8
    space, notes = _space(decoded, compat=compat)
    kept = decoded.icc if space is not None and space.returns else None
    unit = _unit(rgb)
    seen = unit if space is None else space.to_srgb(unit[..., :1] if space.channels == 1 else unit)
    return Picture(
        rgb=torch.from_numpy(np.ascontiguousarray(seen)),
        alpha=None if alpha is None else torch.from_numpy(_unit(alpha)),
        icc=kept,
        depth=depth,
        samples=rgb if space is None or space.returns else None,
        notes=decoded.notes + notes,
    )


@dataclass(frozen=True, eq=False)
class Stored:
    """What a file holds, of which the colours of a part may be wanted.

    Attributes:
        samples: uint8 or uint16 [H, W, 3 or 4].
        space: of its profile; None: sRGB.

    """

    samples: Samples
    space: colour.Profile | None

    def colours(self, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """Float32 [h, w, 3], 0..1, sRGB."""
        unit = _unit(self.samples[rows, :, :3])  # whole rows: a part's colours have the whole's bits
        seen = unit if self.space is None else self.space.to_srgb(unit)
        return torch.from_numpy(np.ascontiguousarray(seen[:, columns]))


def read_back(data: bytes) -> Stored:
    """Decode a picture of this engine's own, whatever its size."""
    own = Limits(max_input_bytes=len(data), max_pixels=MAX_SIDE**2)
    decoded = _decode(data, own, "image", compat=False)
    return Stored(decoded.samples, _space(decoded, compat=False)[0])


def load_mask(
    data: bytes, limits: Limits, field: str, channel: Channel, *, compat: bool = False
) -> torch.Tensor:
    """Decode one channel of a picture as a mask, float32 [H, W], 1 = repaint.

    A colour is taken as stored, whatever the profile. Alpha is turned round: transparent = repaint.
    A picture without alpha is refused for its alpha, or is an empty mask under `compat`.

    Raises:
        InputError: as `load`. MaskError: no such channel.

    """
    decoded = _decode(data, limits, field, compat=compat, drop_keyed=False)
    rgb, alpha = _split(decoded.samples)
    if channel != "alpha":
        return torch.from_numpy(_unit(rgb[..., ("red", "green", "blue").index(channel)]))
    if alpha is not None:
        return 1 - torch.from_numpy(_unit(alpha))
    if compat:
        return torch.zeros(rgb.shape[:2])
    fix = "name a colour channel (red for grey masks), or save the mask with transparency"
    raise MaskError("the mask picture has no transparency", field=field, value="alpha", fix=fix)


@dataclass(frozen=True)
class _Decoded:
    samples: Samples  # [H, W, 1 to 4], upright
    icc: bytes | None
    notes: tuple[str, ...]


def _decode(data: bytes, limits: Limits, field: str, *, compat: bool, drop_keyed: bool = True) -> _Decoded:
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
        except Exception as error:
            # Pillow's decoders raise a dozen kinds of error for broken bytes; each of them means just that.
            raise _broken(error, field) from error
        return _Decoded(
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


def _split(samples: Samples) -> tuple[Samples, Samples | None]:
    """Colour [H, W, 3] and alpha [H, W]."""
    channels = samples.shape[-1]
    colours = samples[..., : 3 if channels >= 3 else 1]
    rgb = np.broadcast_to(colours, (*samples.shape[:2], 3))  # grey: no copies
    return rgb, samples[..., -1] if channels in {2, 4} else None


def _unit(samples: Samples) -> NDArray[np.float32]:
    full = np.float32(np.iinfo(samples.dtype).max)
    return np.divide(samples, full, dtype=np.float32, order="C")


def _space(decoded: _Decoded, *, compat: bool) -> tuple[colour.Profile | None, tuple[str, ...]]:
    if decoded.icc is None or compat:
        return None, ()
    channels = 1 if decoded.samples.shape[-1] < 3 else 3
    try:
        space = colour.read(decoded.icc)
    except colour.ProfileError as error:
        return None, (f"its colour profile was ignored: {error}",)
    if space.channels != channels:
        return None, ("its colour profile was ignored: it is not for pictures with these channels",)
    note = () if space.returns else ("its colour profile leads into sRGB only; the result is sRGB",)
    return space, note
