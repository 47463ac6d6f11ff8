"""Growing, shrinking and softening of masks, float32 [H, W]. Grey stays grey; the border invents nothing.

Each costs the same for any radius, but for `diamond`, whose cost grows with the radius' logarithm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Plane = NDArray[np.float32]


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
    """Dilation by |dx| + |dy| <= radius, in a number of passes that grows with log2(radius).

    A diamond of radius r, moved to the four points at distance b <= r and left in the middle, covers the
    diamond of radius r + b. On the way a move may leave the picture, hence the margin.
    """
    margin = radius // 2 + 1
    grown = np.pad(mask, margin, constant_values=-np.inf)
    reached = 0
    while reached < radius:
        step = min(max(reached, 1), radius - reached)
        grown = _plus(grown, step)
        reached += step
    return np.ascontiguousarray(grown[margin:-margin, margin:-margin])


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
