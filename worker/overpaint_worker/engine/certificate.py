"""What a repaint did to what it was to spare: figures for the receipt, taken from the file that was written.

Colours are compared in CIE 1976 L*a*b* (D65, from sRGB by IEC 61966-2-1); a colour difference is the distance
there, Delta E*ab, of which about 2 is just seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from overpaint_worker.engine import morphology
from overpaint_worker.engine.deep_png import Samples

RING: Final = 8
"""Pixels, counted as a square, by which the ring reaches out from the mask."""
BAND_PIXELS: Final = 2**16
"""So many are compared at once: a pixel takes up to four hundred bytes for that."""

Doubles = NDArray[np.float64]
Where = NDArray[np.bool_]

_TO_XYZ: Final = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)  # IEC 61966-2-1
_WHITE: Final = _TO_XYZ.sum(axis=1)
_BEND: Final = 6 / 29


@dataclass(frozen=True)
class Outside:
    """How much changed where the mask is 0."""

    largest: float
    """Largest difference to the original of any channel, in 8-bit levels."""
    changed: float
    """Share of those pixels that differ at all."""

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        return {"largest_change": round(self.largest, 4), "changed_share": round(self.changed, 6)}


@dataclass(frozen=True)
class Shift:
    """How the colours of some pixels moved, on average."""

    lightness: float
    a: float
    b: float
    distance: float
    """Mean of the pixels' own Delta E*ab."""

    def to_json(self) -> dict[str, float]:
        """For the receipt."""
        named = {"L": self.lightness, "a": self.a, "b": self.b, "delta_e": self.distance}
        return {name: round(value, 4) for name, value in named.items()}


@dataclass(frozen=True)
class Certificate:
    """All figures of one result. None where the mask leaves no such pixels."""

    coverage: float
    """Mean of the mask on the canvas, 0..1."""
    outside: Outside | None
    ring: Shift | None
    """Of the ring just outside the mask, in the file."""
    ring_rendered: Shift | None
    """The same of what the model made, before any original was put back: how far it would show a seam."""
    seam: float | None
    """Mean Delta E*ab between neighbours of which one is under the mask and the other is not."""
    seam_before: float | None
    """The same in the original."""

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "coverage": round(self.coverage, 6),
            "outside": self.outside.to_json() if self.outside else None,
            "ring": {
                "width": RING,
                "shift": self.ring.to_json() if self.ring else None,
                "rendered_shift": self.ring_rendered.to_json() if self.ring_rendered else None,
            },
            "seam_contrast": {"result": _rounded(self.seam), "original": _rounded(self.seam_before)},
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def outside(written: Samples, original: Samples, mask: Tensor, levels: int) -> Outside | None:
    """Compare two pictures [H, W, 3] of whole levels 0..`levels` where the mask [H, W] is 0."""
    spared = (mask == 0).numpy()
    if not spared.any():
        return None
    differ = [written[..., channel] != original[..., channel] for channel in range(3)]
    changed = (differ[0] | differ[1] | differ[2]) & spared
    one, other = written[changed].astype(np.int32), original[changed].astype(np.int32)
    largest = int(np.abs(one - other).max(initial=0))
    return Outside(largest * 255 / levels, int(changed.sum()) / int(spared.sum()))


def surroundings(mask: Tensor) -> tuple[slice, slice]:
    """The rows and columns of a mask [H, W] and its ring: all that `ring_shift` and `seam_contrast` see."""
    return morphology.around((mask > 0).numpy(), RING)


def ring_shift(after: Tensor, before: Tensor, mask: Tensor) -> Shift | None:
    """How the ring just outside the mask [H, W] differs between two pictures [H, W, 3], 0..1, sRGB."""
    near = surroundings(mask)
    under = (mask[near] > 0).numpy()
    if under.all():
        return None
    ring = (morphology.dilate(under.astype(np.float32), RING, tapered=False) > 0) & ~under
    one, other = after.numpy()[near], before.numpy()[near]
    moves, distance = np.zeros(3), 0.0
    for rows in _bands(ring):
        moved = lab(one[rows][ring[rows]]) - lab(other[rows][ring[rows]])
        moves += moved.sum(axis=0)
        distance += _length(moved).sum()
    lightness, a, b, mean = (float(value) / int(ring.sum()) for value in (*moves, distance))
    return Shift(lightness, a, b, mean)


def seam_contrast(picture: Tensor, mask: Tensor) -> float | None:
    """Mean colour difference across the mask's edge: between side by side pixels, one with mask 0."""
    near = surroundings(mask)
    values, under = picture[near].numpy(), (mask[near] > 0).numpy()
    distance, count = 0.0, 0
    for rows in _bands(under):
        upper = slice(max(rows.start - 1, 0), rows.stop)  # with the row above, for pairs across the border
        beside, below = under[rows, 1:] != under[rows, :-1], under[upper][1:] != under[upper][:-1]
        one = np.concatenate([values[rows, 1:][beside], values[upper][1:][below]])
        other = np.concatenate([values[rows, :-1][beside], values[upper][:-1][below]])
        distance += float(_length(lab(one) - lab(other)).sum())
        count += len(one)
    return distance / count if count else None


def _bands(plane: Where) -> Iterator[slice]:
    """The rows of a plane [H, W], some at a time."""
    height, width = plane.shape
    step = max(BAND_PIXELS // max(width, 1), 1)
    return (slice(top, top + step) for top in range(0, height, step))


def lab(srgb: NDArray[np.float32]) -> Doubles:
    """Colours [N, 3] in sRGB, 0..1, in L*a*b*."""
    values = np.clip(srgb.astype(np.float64), 0, 1)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _WHITE
    x, y, z = np.moveaxis(np.where(ratio > _BEND**3, np.cbrt(ratio), ratio / (3 * _BEND**2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _length(difference: Doubles) -> Doubles:
    return np.asarray(np.sqrt((difference**2).sum(axis=-1)))
