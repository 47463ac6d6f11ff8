"""How large a picture is after `prepare` or `finish`, and whether masks fit it, from sizes alone.

Sizes are (width, height) in pixels, upright. The engine plans the same steps with boxes and refuses what does
not fit; a test holds the two together.
"""

from collections.abc import Iterable, Mapping
from typing import Final, Literal

from overpaint_shared.errors import Problem
from overpaint_shared.job import JobSpec
from overpaint_shared.spec.masks import ImageMask, leaves
from overpaint_shared.spec.pictures import Crop, FinishOp, Pad, PrepareOp, Scale

Size = tuple[int, int]
At = Literal["source", "canvas"]
"""Whose size a mask has: the source's, or the canvas's, which is what `prepare` makes of it."""

LATENT_MULTIPLE = 8
"""Sides that a model takes are multiples of this."""


def size_after(
    size: Size | None, ops: Iterable[PrepareOp | FinishOp], *, compat: bool = False
) -> Size | None:
    """The size after these operations; None where it depends on what is not known.

    `compat`: a crop that reaches over the border is made smaller, instead of refused by the worker.
    """
    for op in ops:
        size = _after(size, op, compat=compat)
    return size


def _after(size: Size | None, op: PrepareOp | FinishOp, *, compat: bool) -> Size | None:
    if isinstance(op, Scale):
        return _scaled(size, op)
    if isinstance(op, Crop) and not compat:
        return op.width, op.height
    if size is None:
        return None
    width, height = size
    if isinstance(op, Crop):
        return min(op.width, width - min(op.x, width - 1)), min(op.height, height - min(op.y, height - 1))
    if isinstance(op, Pad):
        return op.left + width + op.right, op.top + height + op.bottom
    return round(width * op.factor), round(height * op.factor)


def _scaled(size: Size | None, op: Scale) -> Size | None:
    if op.width and op.height:
        return op.width, op.height
    if size is None or not (op.width or op.height):
        return size
    width, height = size
    if op.width:
        return op.width, max(1, round(height * op.width / width))
    return max(1, round(width * op.height / height)), op.height


def is_whole(size: Size) -> bool:
    """Whether both sides are what a model takes."""
    return not any(side % LATENT_MULTIPLE for side in size)


def padded(size: Size) -> Size:
    """The next size that a model takes, on the way up."""
    width, height = (-(-side // LATENT_MULTIPLE) * LATENT_MULTIPLE for side in size)
    return width, height


def cropped(size: Size) -> Size:
    """The next size that a model takes, on the way down."""
    width, height = (side // LATENT_MULTIPLE * LATENT_MULTIPLE for side in size)
    return width, height


MISFIT_FIX: Final = 'scale the mask to that size, or say by "at" which one it has ("source" or "canvas")'


def misfits(spec: JobSpec, sizes: Mapping[str, Size]) -> list[Problem]:
    """The mask pictures of a job that a worker will refuse for their size, under any `compat`.

    `sizes`: of the pictures that have been looked at, by their reference in the spec; for what is not among
    them nothing is said.
    """
    source = sizes.get(spec.source.image)
    if source is None or spec.mask is None:
        return []
    canvas = size_after(source, spec.prepare, compat=spec.compat == "comfyui") or source
    known: dict[At, Size] = {"source": source, "canvas": canvas}
    found = [
        misfit(f"{path}.image", sizes[mask.image], mask.at, known)
        for path, mask in leaves(spec.mask)
        if isinstance(mask, ImageMask) and mask.image in sizes
    ]
    return [problem for problem in found if problem]


def misfit(path: str, given: Size, at: At, known: Mapping[At, Size]) -> Problem | None:
    """What is wrong with a mask of the size `given`, which is to be that of `known[at]`; None: nothing.

    Masks are never resized in silence. `path`: the mask's picture in the spec.
    """
    if given == known[at]:
        return None
    fitting = [other for other, size in known.items() if size == given]
    return Problem(
        path=path,
        message=f"the mask is {_words(given)} pixels, but the {at} is {_words(known[at])}",
        given=_words(given),
        allowed=_words(known[at]),
        suggestion=f'"at": "{fitting[0]}", whose size it has' if fitting else None,
    )


def _words(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
