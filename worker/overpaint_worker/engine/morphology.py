"""Growing, shrinking, softening and blurring of masks, float32 [H, W].

Grey stays grey; the border invents nothing.

Each costs the same for any radius, but for `diamond`, whose cost grows with the radius' logarithm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

Plane = NDArray[np.float32]

TRUNCATE = 4.0
"""Standard deviations at which a Gaussian ends."""
WIDEST_DIRECT = 8.0
"""Standard deviation up to which adding up a Gaussian's own few pixels is faster than two transforms."""
BAND_PIXELS = 2**20
"""So many are transformed at once, so that their doubles take little memory beside the mask."""


def dilate(mask: Plane, radius: int, *, tapered: bool) -> Plane:
    """The largest value within `radius` steps to four neighbours (tapered, a diamond) or eight (a square).

    The same as `radius` grey dilations with a 3 x 3 footprint and reflected borders.
    """
    if radius == 0:
        return mask
    if tapered:
        return _diamond(mask, min(radius, sum(mask.shape)))
    reach = [min(radius, side) for side in mask.shape]
    return ndimage.maximum_filter(mask, size=[2 * r + 1 for r in reach], mode="reflect")


def erode(mask: Plane, radius: int, *, tapered: bool) -> Plane:
    """The smallest value within `radius` steps: dilation of what the mask spares."""
    return -dilate(-mask, radius, tapered=tapered)


def _diamond(mask: Plane, radius: int) -> Plane:
    """Dilation by |dx| + |dy| <= radius, in a number of passes that grows with the radius' logarithm.

    A diamond of radius r, moved to the four points at distance b and left in the middle, covers the diamond
    of radius r + b. With b <= r // 2 + 1 no move need leave the picture: what is farther than r from a pixel
    is at least b from it along one axis, so that the move by b along that axis leads towards it.
    """
    grown, reached = mask, 0
    while reached < radius:
        step = min(reached // 2 + 1, radius - reached)
        grown = _plus(grown, step)
        reached += step
    return grown


def _plus(plane: Plane, step: int) -> Plane:
    """The largest of a pixel and the four at distance `step`."""
    out = plane.copy()
    np.maximum(out[step:], plane[:-step], out=out[step:])
    np.maximum(out[:-step], plane[step:], out=out[:-step])
    np.maximum(out[:, step:], plane[:, :-step], out=out[:, step:])
    np.maximum(out[:, :-step], plane[:, step:], out=out[:, :-step])
    return out


def soften_inward(mask: Plane, width: int) -> Plane:
    """Weaken the mask near where it is 0: by d / width at Euclidean distance d < width from there.

    What is 0 stays 0, what is farther in stays as it is, nothing grows, and the picture's border is no edge.
    """
    inside = mask > 0
    if width <= 1 or inside.all() or not inside.any():
        return mask
    box = around(inside, 1)
    distance = ndimage.distance_transform_edt(inside[box]).astype(np.float32)
    out = mask.copy()
    out[box] *= np.minimum(distance / width, 1)
    return out


def blur(mask: Plane, deviation: float) -> Plane:
    """Blur with a Gaussian that ends after four standard deviations; beyond its border a mask is mirrored."""
    if deviation <= WIDEST_DIRECT:
        return np.asarray(ndimage.gaussian_filter(mask, deviation, truncate=TRUNCATE), dtype=np.float32)
    reach = int(TRUNCATE * deviation + 0.5)
    down = _blurred_rows(mask.T, deviation, reach).T
    both = _blurred_rows(down, deviation, reach)
    both[dilate(mask, reach, tapered=False) <= 0] = 0  # where it sees nothing, no residue of rounding stays
    return both


def _blurred_rows(plane: Plane, deviation: float, reach: int) -> Plane:
    """Convolve each row of [H, W].

    A cosine transform sees a row mirrored at its ends, and makes a product of the convolution.
    """
    height, width = plane.shape
    places = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (places / deviation) ** 2)
    folded = np.bincount(places % (2 * width), weights / weights.sum(), 2 * width)
    response = fft.rfft(folded).real[:width]
    out = np.empty((height, width), np.float32)
    step = max(BAND_PIXELS // width, 1)
    for top in range(0, height, step):
        band = fft.dct(np.asarray(plane[top : top + step], np.float64, order="C"), axis=1)
        out[top : top + step] = fft.idct(band * response, axis=1)
    return out


def around(inside: NDArray[np.bool_], reach: int) -> tuple[slice, slice]:
    """The rows and columns of what is true [H, W], and `reach` more on each side; empty where nothing is.

    What is done to a mask's surroundings need not look at the rest of a large picture.
    """
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return slice(0), slice(0)
    return _side(rows, reach), _side(columns, reach)


def _side(places: NDArray[np.intp], reach: int) -> slice:
    return slice(max(int(places[0]) - reach, 0), int(places[-1]) + reach + 1)
