"""A rendered picture to bytes: in the source's profile and depth, original pixels put back bit for bit."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from overpaint_shared.errors import InputError, PrecisionError
from overpaint_shared.job import Output

from . import colour, morphology, png
from .deep_png import Samples

JPEG_QUALITY = 95
WEBP_QUALITY = 90
WEBP_LOSSLESS_EFFORT = 40  # of 100: beyond it, seconds buy a few bytes
WEBP_MAX_SIDE = 16_383
JPEG_MAX_SIDE = 65_535
XMP_KEY = "XML:com.adobe.xmp"
LONGEST_EXIF = 60_000  # a JPEG segment holds 65,533 bytes, of which EXIF needs some


@dataclass(frozen=True, eq=False)
class Spared:
    """What the mask spares, to be put back as the file had it.

    Attributes:
        samples: the file's own values [H, W, 3], in its own space and depth.
        where: bool [H, W], true where the mask is 0.

    """

    samples: Samples
    where: NDArray[np.bool_]


def check(output: Output, width: int, height: int, alpha: torch.Tensor | None, field: str = "output") -> None:
    """Refuse what the format cannot hold, before anything is rendered.

    Args:
        output: the job's wishes.
        width: of the result, pixels.
        height: of the result, pixels.
        alpha: of the result, [H, W], or None.
        field: where the wishes stand in the job.

    Raises:
        InputError: transparency in a JPEG, or too long a side.

    """
    where = f"{field}.format"
    if output.format == "jpeg" and alpha is not None and bool((alpha < 1).any()):
        fix = 'use "png" or "webp", or a source without transparency'
        raise InputError(
            "jpeg holds no transparency, and the result has some", field=where, value="jpeg", fix=fix
        )
    longest = {"webp": WEBP_MAX_SIDE, "jpeg": JPEG_MAX_SIDE}.get(output.format)
    if longest is not None and max(width, height) > longest:
        fix = f'use "png", or make the result no longer than {longest} pixels a side'
        raise InputError(
            f"{output.format} cannot hold {width} x {height} pixels",
            field=where,
            value=output.format,
            fix=fix,
        )


def alpha_out(alpha: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The result's alpha [H, W]: what was opaque stays so, and what was repainted becomes so.

    Without a mask all was repainted, so that nothing is transparent.
    """
    if alpha is None or mask is None:
        return None
    return torch.maximum(alpha, mask)


def quantise(values: torch.Tensor, depth: Literal[8, 16] = 8, *, truncate: bool = False) -> Samples:
    """Values 0..1 of any shape to whole levels: the nearest, or, as the reference does, the next lower one.

    Values outside 0..1 are clipped.

    Raises:
        PrecisionError: a value is not a number.

    """
    top = 2**depth - 1
    found = values.to("cpu", torch.float32)
    least, most = (float(end) for end in torch.aminmax(found))  # one pass, which a NaN comes through
    if not math.isfinite(least) or not math.isfinite(most):
        raise PrecisionError(
            "the rendered picture holds values that are no numbers", field="image", value="nan",
            fix="render it with another model, or an operator has the weights of this one checked",
        )  # fmt: skip
    levels = found * top
    if least < 0 or most > 1:
        levels.clamp_(0, top)
    whole = levels if truncate else levels.round_()
    return np.asarray(whole.numpy(), dtype=np.uint8 if depth == 8 else np.uint16)


def encode(
    image: torch.Tensor,
    output: Output,
    icc: bytes | None = None,
    alpha: torch.Tensor | None = None,
    text: Mapping[str, str] | None = None,
    *,
    depth: Literal[8, 16] = 8,
    spared: Spared | None = None,
    compat: bool = False,
) -> bytes:
    """Encode a picture.

    Args:
        image: float [H, W, 3], 0..1, sRGB.
        output: format and quality.
        icc: the profile the result returns to; None: sRGB.
        alpha: float [H, W], 1 = opaque, or None.
        text: notes to carry. In a PNG each is a text chunk of its name; elsewhere they stand as one JSON
            object in the EXIF user comment, where they fit. XMP_KEY names an XMP packet in every format.
        depth: bits a sample; 16 in PNG only, the other formats hold 8.
        spared: pixels to put back as the file had them.
        compat: cut levels off instead of rounding them, as the reference does.

    Raises:
        InputError: what `check` refuses. PrecisionError: the picture is not made of numbers.

    """
    check(output, image.shape[1], image.shape[0], alpha)
    bits: Literal[8, 16] = depth if output.format == "png" else 8
    levels = _levels(image, icc, bits, spared, compat=compat)
    if alpha is not None and output.format != "jpeg":
        levels = np.concatenate([levels, quantise(alpha, bits, truncate=compat)[..., None]], axis=-1)
    if output.format == "png":
        return _png(levels, icc, text or {})
    return _lossy(Image.fromarray(levels), output, icc, text or {})


def _levels(
    image: torch.Tensor, icc: bytes | None, depth: Literal[8, 16], spared: Spared | None, *, compat: bool
) -> Samples:
    """What the file will hold [H, W, 3]; what is put back needs no computing."""
    if spared is None or spared.samples.dtype.itemsize * 8 != depth:
        return quantise(in_space(image, icc), depth, truncate=compat)
    levels, anew = spared.samples.copy(), ~spared.where
    rows, columns = morphology.around(anew, 0)
    if anew.any():
        made = quantise(in_space(image[rows], icc)[:, columns], depth, truncate=compat)
        np.copyto(levels[rows, columns], made, where=anew[rows, columns, None])
    return levels


def grey_png(plane: torch.Tensor) -> bytes:
    """A plane [H, W], 0..1, as a PNG of three equal channels."""
    return _png(np.repeat(quantise(plane)[..., None], 3, axis=-1), None, {})


def in_space(image: torch.Tensor, icc: bytes | None) -> torch.Tensor:
    """A picture [H, W, 3] in sRGB, in the space of a profile instead; None: sRGB."""
    if icc is None:
        return image
    space = colour.read(icc)
    convert = space.from_srgb
    return torch.from_numpy(
        colour.in_bands(lambda band: convert(band.astype(np.float32)), image.cpu().numpy())
    )


def _png(levels: Samples, icc: bytes | None, text: Mapping[str, str]) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        if key == XMP_KEY:
            info.add_itxt(key, value)
        else:
            info.add_text(key, value, zip=len(value) > 1024)
    return png.write(levels, info, icc)


def _lossy(image: Image.Image, output: Output, icc: bytes | None, text: Mapping[str, str]) -> bytes:
    notes = {key: value for key, value in text.items() if key != XMP_KEY}
    carried = {"icc_profile": icc, "exif": _exif(notes), "xmp": text.get(XMP_KEY, "").encode()}
    options: dict[str, object] = {key: value for key, value in carried.items() if value}
    if output.format == "jpeg":
        options |= {
            "quality": output.quality or JPEG_QUALITY,
            "subsampling": 0,
        }  # 0: colour at full resolution
    elif output.lossless:
        # `exact`: the colour of transparent pixels is the picture's too
        options |= {"lossless": True, "exact": True, "quality": WEBP_LOSSLESS_EFFORT}
    else:
        options |= {"quality": output.quality or WEBP_QUALITY}
    out = io.BytesIO()
    image.save(out, output.format.upper(), **options)
    return out.getvalue()


def _exif(notes: Mapping[str, str]) -> bytes:
    """The notes as a user comment; nothing where they are too long for a segment."""
    comment = b"ASCII\0\0\0" + json.dumps(dict(notes), sort_keys=True).encode("ascii")
    if not notes or len(comment) > LONGEST_EXIF:
        return b""
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()
