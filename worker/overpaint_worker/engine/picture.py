"""From a decoded file to a picture to work on, in sRGB, its alpha, depth and profile kept; or to a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from overpaint_shared.errors import MaskError
from overpaint_shared.settings import Limits

from . import colour
from .decoding import MAX_SIDE, Decoded, decode
from .deep_png import Samples

ALL = slice(None)

Channel = Literal["red", "green", "blue", "alpha"]


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
    return of(decode(data, limits, field, compat=compat), compat=compat)


def of(decoded: Decoded, *, compat: bool = False) -> Picture:
    """The picture that a file holds."""
    rgb, alpha = _split(decoded.samples)
    depth: Literal[8, 16] = 16 if decoded.samples.dtype == np.uint16 else 8
    space, notes = _space(decoded, compat=compat)
    kept = decoded.icc if space is not None and space.returns else None
    return Picture(
        rgb=_seen(rgb, space),
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
        seen = _seen(self.samples[rows, :, :3], self.space)  # whole rows, as `in_bands` wants them
        return seen[:, columns].contiguous()


def read_back(data: bytes) -> Stored:
    """Decode a picture of this engine's own, whatever its size."""
    own = Limits(max_input_bytes=len(data), max_pixels=MAX_SIDE**2)
    decoded = decode(data, own, "image")
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
    decoded = decode(data, limits, field, compat=compat, drop_keyed=False)
    return plane_of(decoded, channel, field, compat=compat).mask()


@dataclass(frozen=True, eq=False)
class Plane:
    """One channel of a picture as stored, uint8 or uint16 [H, W]: a quarter of what it takes as a mask."""

    samples: Samples
    inverted: bool = False

    def mask(self) -> torch.Tensor:
        """Float32 [H, W], 1 = repaint."""
        unit = torch.from_numpy(_unit(self.samples))
        return 1 - unit if self.inverted else unit


def plane_of(decoded: Decoded, channel: Channel, field: str, *, compat: bool = False) -> Plane:
    """One channel of a picture, by itself; see `load_mask`. Raises MaskError: no such channel."""
    rgb, alpha = _split(decoded.samples)
    if channel != "alpha":
        return Plane(np.ascontiguousarray(rgb[..., ("red", "green", "blue").index(channel)]))
    if alpha is not None:
        return Plane(np.ascontiguousarray(alpha), inverted=True)
    if compat:
        return Plane(np.zeros(rgb.shape[:2], np.uint8))
    fix = "name a colour channel (red for grey masks), or save the mask with transparency"
    raise MaskError("the mask picture has no transparency", field=field, value="alpha", fix=fix)


def _split(samples: Samples) -> tuple[Samples, Samples | None]:
    """Colour [H, W, 3] and alpha [H, W]."""
    channels = samples.shape[-1]
    colours = samples[..., : 3 if channels >= 3 else 1]
    rgb = np.broadcast_to(colours, (*samples.shape[:2], 3))  # grey: no copies
    return rgb, samples[..., -1] if channels in {2, 4} else None


def _seen(rgb: Samples, space: colour.Profile | None) -> torch.Tensor:
    """The colours of samples [H, W, 3] in sRGB, float32, 0..1."""
    if space is None:
        return torch.from_numpy(_unit(rgb))
    convert = space.to_srgb
    device = slice(space.channels)
    return torch.from_numpy(colour.in_bands(lambda band: convert(_unit(band)[..., device]), rgb))


def _unit(samples: Samples) -> NDArray[np.float32]:
    full = np.float32(np.iinfo(samples.dtype).max)
    return np.divide(samples, full, dtype=np.float32, order="C")


def _space(decoded: Decoded, *, compat: bool) -> tuple[colour.Profile | None, tuple[str, ...]]:
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
