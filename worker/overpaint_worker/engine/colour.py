"""Colour profiles: into sRGB, which the models know, and back into the picture's own space.

An ICC profile of the matrix kind (three primaries, three tone curves: sRGB, Display P3, Adobe RGB, ProPhoto)
is computed here in float, so that sixteen-bit pictures keep their depth. One of the table kind goes through
LittleCMS by way of Pillow, which works in eight bits. Formulas: ICC.1:2022, sections 8.3, 10.6 and 10.18;
the sRGB curve: IEC 61966-2-1.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

HEADER = 128
LARGEST = 2**20
"""As much as Pillow inflates in a PNG: a profile that is kept must be readable in the result."""
MAX_TAGS = 256
CURVE_STEPS = 65536
BAND_PIXELS = 2**18
"""So many are converted at once: on its way a pixel takes about a hundred bytes."""
# A profile that moves no colour by this much is sRGB by another name: its writers round the primaries
# differently, which shows near black by two thirds of an 8-bit level.
LEVEL = 1 / 255
# The primaries of sRGB, adapted to the profile connection space's white (D50), as columns.
SRGB_TO_XYZ = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)


class ProfileError(ValueError):
    """The profile cannot be read or does not fit; the message says why."""


class Profile(Protocol):
    """A way into sRGB and, where `returns` holds, back. Arrays are float32 [..., channels], 0..1."""

    @property
    def channels(self) -> int:
        """Of a device value: 1 or 3."""

    @property
    def returns(self) -> bool:
        """Whether there is a way back."""

    def to_srgb(self, device: Floats) -> Floats:
        """Device values [..., channels] to sRGB [..., 3], clipped to 0..1."""

    def from_srgb(self, srgb: Floats) -> Floats:
        """Values in sRGB [..., 3] to device values [..., channels], clipped to 0..1."""


def in_bands(convert: Callable[[NDArray[Any]], Floats], picture: NDArray[Any]) -> Floats:
    """Convert a picture [H, W, channels] to [H, W, 3], some whole rows at a time.

    A row's values do not depend on its neighbours, so they have the same bits as in one piece.
    """
    height, width = picture.shape[:2]
    out = np.empty((height, width, 3), np.float32)
    step = max(BAND_PIXELS // width, 1)
    for top in range(0, height, step):
        out[top : top + step] = convert(picture[top : top + step])
    return out


@lru_cache(maxsize=16)
def read(icc: bytes) -> Profile:
    """Read a profile.

    Raises:
        ProfileError: it is broken, or neither for grey nor for RGB.

    """
    if len(icc) > LARGEST:
        raise ProfileError(f"it has more than {LARGEST} bytes")
    try:
        return _read(icc)
    except Exception as error:  # a stranger's bytes, read by three libraries: no list of errors is complete
        raise ProfileError(str(error) or "its tags cannot be read") from error


def _read(icc: bytes) -> Profile:
    if len(icc) < HEADER + 4 or icc[36:40] != b"acsp":
        raise ProfileError("it has no ICC header")
    space, tags = icc[16:20], _tags(icc)
    if space == b"GRAY":
        return Grey(_single(_curve(tags[b"kTRC"]))) if b"kTRC" in tags else _missing("kTRC")
    if space != b"RGB ":
        raise ProfileError(f"it is for {space.decode('latin-1').strip()!r} pictures, not for RGB or grey")
    if b"A2B0" in tags or not {b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC"} <= tags.keys():
        return Tables.of(icc)
    return _matrix(tags)


def _missing(tag: str) -> Profile:
    raise ProfileError(f"its tag {tag} is missing")


def _tags(icc: bytes) -> dict[bytes, bytes]:
    (count,) = struct.unpack_from(">I", icc, HEADER)
    if count > MAX_TAGS:
        raise ProfileError(f"it claims {count} tags")
    table = (struct.unpack_from(">4sII", icc, HEADER + 4 + 12 * index) for index in range(count))
    return {name: icc[offset : offset + size] for name, offset, size in table}


def _matrix(tags: dict[bytes, bytes]) -> Profile:
    columns = [
        np.array(struct.unpack_from(">3i", tags[name], 8)) / 65536 for name in (b"rXYZ", b"gXYZ", b"bXYZ")
    ]
    curves = [_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")]
    matrix = np.linalg.inv(SRGB_TO_XYZ) @ np.stack(columns, axis=1)
    if abs(np.linalg.det(matrix)) < 1e-6:
        raise ProfileError("its primaries span no space")
    profile = Matrix.of(curves, matrix)
    return Identity() if _is_srgb(profile) else profile


def _is_srgb(profile: Profile) -> bool:
    steps = np.linspace(0, 1, 9, dtype=np.float32)
    lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1)
    return bool(np.abs(profile.to_srgb(lattice) - lattice).max() < LEVEL)


def _curve(tag: bytes) -> Doubles:
    """A tone curve, device value to linear light, as CURVE_STEPS + 1 even samples."""
    x = np.linspace(0, 1, CURVE_STEPS + 1)
    kind = tag[:4]
    if kind == b"para":
        y = _parametric(x, tag)
    elif kind == b"curv":
        y = _sampled(x, tag)
    else:
        raise ProfileError(f"a tone curve is of the unknown kind {kind!r}")
    if not np.isfinite(y).all():
        raise ProfileError("a tone curve has no finite values")
    return np.asarray(np.maximum.accumulate(np.clip(y, 0, 1)))  # rising, so that it can be inverted


def _sampled(x: Doubles, tag: bytes) -> Doubles:
    (count,) = struct.unpack_from(">I", tag, 8)
    if count == 0:
        return x
    if count == 1:
        return np.asarray(x ** (struct.unpack_from(">H", tag, 12)[0] / 256))
    table = np.frombuffer(tag, ">u2", count, 12) / 65535
    return np.asarray(np.interp(x, np.linspace(0, 1, count), table))


def _parametric(x: Doubles, tag: bytes) -> Doubles:
    """ICC.1:2022, table 68: five kinds, each the one before with more of its parameters free."""
    (kind,) = struct.unpack_from(">H", tag, 8)
    if kind > 4:
        raise ProfileError(f"a tone curve has the unknown function {kind}")
    values = [v / 65536 for v in struct.unpack_from(f">{(1, 3, 4, 5, 7)[kind]}i", tag, 12)]
    g, a, b = (values[0], values[1], values[2]) if kind else (values[0], 1.0, 0.0)
    c, d, e, f = 0.0, -b / a if kind in {1, 2} else 0.0, 0.0, 0.0
    if kind == 2:
        e = f = values[3]
    if kind >= 3:
        c, d = values[3], values[4]
    if kind == 4:
        e, f = values[5], values[6]
    return np.where(x >= d, np.clip(a * x + b, 0, None) ** g + e, c * x + f)


def _srgb_to_linear(srgb: Doubles) -> Doubles:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _linear_to_srgb(linear: Floats) -> Floats:
    """Linear light 0..1 to sRGB, in float32: this and `_lookup` see every pixel."""
    toe = linear * np.float32(12.92)
    power = np.maximum(linear, np.float32(0.0031308)) ** np.float32(1 / 2.4)
    return np.where(linear <= np.float32(0.0031308), toe, power * np.float32(1.055) - np.float32(0.055))


def _lookup(table: Floats, values: Floats) -> Floats:
    """Values 0..1 in a table of CURVE_STEPS + 1 even samples, linearly between them."""
    place = np.clip(values, 0, 1) * np.float32(CURVE_STEPS)
    below = np.minimum(place.astype(np.int32), CURVE_STEPS - 1)
    share = place - below.astype(np.float32)
    return np.asarray(table[below] * (1 - share) + table[below + 1] * share)


_AXIS = np.linspace(0, 1, CURVE_STEPS + 1)
_LINEAR = _srgb_to_linear(_AXIS)
_TO_LINEAR = _LINEAR.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Identity:
    """The space is sRGB: values stay as they are, bit for bit."""

    channels: int = 3
    returns: bool = True

    def to_srgb(self, device: Floats) -> Floats:
        """The same values."""
        return device

    def from_srgb(self, srgb: Floats) -> Floats:
        """The same values."""
        return srgb


@dataclass(frozen=True, eq=False)
class Matrix:
    """Three tone curves and a matrix [3, 3] from linear device values to linear sRGB.

    The mapping is relative colorimetric: white stays white. Colours outside sRGB are clipped.
    `curves` [3, CURVE_STEPS + 1] lead from device values to linear light, `inverses` from linear light
    (written as sRGB writes it, so that dark values have samples enough) to device values.
    """

    curves: Floats
    inverses: Floats
    matrix: Floats
    channels: int = 3
    returns: bool = True

    @classmethod
    def of(cls, curves: list[Doubles], matrix: Doubles) -> Matrix:
        """Prepare the tables; `curves` rise from 0 to 1."""
        inverses = [np.interp(_LINEAR, curve, _AXIS) for curve in curves]
        return cls(_single(np.stack(curves)), _single(np.stack(inverses)), _single(matrix))

    def to_srgb(self, device: Floats) -> Floats:
        """Curve, matrix, sRGB's curve."""
        linear = np.stack([_lookup(self.curves[c], device[..., c]) for c in range(3)], axis=-1)
        return _linear_to_srgb(np.clip(linear @ self.matrix.T, 0, 1))

    def from_srgb(self, srgb: Floats) -> Floats:
        """The same way back."""
        linear = _lookup(_TO_LINEAR, srgb) @ _single(np.linalg.inv(self.matrix.astype(np.float64))).T
        even = _linear_to_srgb(np.clip(linear, 0, 1))
        return np.stack([_lookup(self.inverses[c], even[..., c]) for c in range(3)], axis=-1)


def _single(values: Doubles) -> Floats:
    return values.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Grey:
    """One tone curve [CURVE_STEPS + 1]. A grey picture becomes RGB, with no way back into its profile."""

    curve: Floats
    channels: int = 1
    returns: bool = False

    def to_srgb(self, device: Floats) -> Floats:
        """Device values [..., 1] to three equal channels."""
        return np.repeat(_linear_to_srgb(_lookup(self.curve, device)), 3, axis=-1)

    def from_srgb(self, srgb: Floats) -> Floats:  # noqa: ARG002 - as every profile
        """Never called: `returns` is false."""
        raise ProfileError("a colour picture has no place in a grey profile")


@dataclass(frozen=True, eq=False)
class Tables:
    """A profile with lookup tables, through LittleCMS: relative colorimetric with black point, 8 bits."""

    into: ImageCms.ImageCmsTransform
    back: ImageCms.ImageCmsTransform | None
    channels: int = 3

    @property
    def returns(self) -> bool:
        """Whether the profile has tables in the other direction: a scanner's has not."""
        return self.back is not None

    @classmethod
    def of(cls, icc: bytes) -> Tables:
        """Build the transforms; raises ProfileError where LittleCMS refuses the profile."""
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            into = _tried(_transform(profile, srgb))
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            raise ProfileError(f"LittleCMS cannot use it: {error}") from error
        try:
            back = _tried(_transform(srgb, profile))
        except (ImageCms.PyCMSError, OSError, ValueError):
            back = None
        return cls(into, back)

    def to_srgb(self, device: Floats) -> Floats:
        """Device values [H, W, 3] to sRGB, each channel in 256 steps."""
        return _through(self.into, device)

    def from_srgb(self, srgb: Floats) -> Floats:
        """The way back, where there is one."""
        if self.back is None:
            raise ProfileError("the profile has no tables from colour to device")
        return _through(self.back, srgb)


def _transform(
    source: ImageCms.ImageCmsProfile, target: ImageCms.ImageCmsProfile
) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        source,
        target,
        "RGB",
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _tried(transform: ImageCms.ImageCmsTransform) -> ImageCms.ImageCmsTransform:
    """The same, after it has been used: some odd profiles can be opened and fail then."""
    _through(transform, np.zeros((1, 1, 3), np.float32))
    return transform


def _through(transform: ImageCms.ImageCmsTransform, values: Floats) -> Floats:
    levels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    result = ImageCms.applyTransform(Image.fromarray(levels), transform)
    return np.asarray(result).astype(np.float32) / np.float32(255)
