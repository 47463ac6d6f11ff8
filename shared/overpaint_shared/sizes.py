"""How large a picture is after `prepare` or `finish`, from sizes alone: for warnings before anything runs.

Sizes are (width, height) in pixels. The engine plans the same steps with boxes and refuses what does not
fit; a test holds the two together.
"""

from collections.abc import Iterable

from overpaint_shared.spec.pictures import Crop, FinishOp, Pad, PrepareOp, Scale

Size = tuple[int, int]

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
