"""Where a mask lies: a workflow's mask as a job's `mask`, if both come to the same pixels.

In a workflow a mask has a size of its own. Nodes that scale it to the picture's do so bilinearly, after all
that was done to the mask; in a job a mask goes through `prepare` with the picture first. The two agree where
nothing scales the mask, or where one plain scaling does and what is done to the mask is the same on either
side of it. Everything else is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from overpaint_producer.workflow.graph import Node
from overpaint_producer.workflow.values import FromFile, FromPad, FromText, MaskValue, Picture, Placed
from overpaint_shared.job import Crop, Invert, Pad, Scale, ScaleBy
from overpaint_shared.sizes import Size, size_after

SizeOf = Callable[[str], Size | None]
"""The size of a picture file, upright; None if it is not known."""

COLOUR_KEY: Final = (
    "a PNG with one transparent colour and no alpha channel gives a mask here, "
    "and none in ComfyUI's Load Image"
)
NO_ALPHA: Final = (
    "a picture without transparency gives a mask of 64 x 64 pixels in ComfyUI, "
    "where feathering it looks otherwise"
)


@dataclass(frozen=True)
class Place:
    """What a mask is laid on."""

    canvas: Picture
    size_of: SizeOf
    is_scaled: bool
    """Whether the node that takes it scales it to the canvas; Set Latent Noise Mask does not."""
    node: Node
    """The node that takes it, at its input `mask`."""

    @property
    def source_size(self) -> Size | None:
        """The loaded picture's."""
        return self.size_of(self.canvas.file)

    @property
    def canvas_size(self) -> Size | None:
        """The prepared picture's."""
        return canvas_size(self.canvas, self.size_of)


def canvas_size(canvas: Picture, size_of: SizeOf) -> Size | None:
    """The size of a picture after its operations, if it can be known."""
    ops = [placed.op for placed in canvas.ops if isinstance(placed.op, Crop | Scale | ScaleBy | Pad)]
    return size_after(size_of(canvas.file), ops, compat=True)


@dataclass(frozen=True)
class Laid:
    """A mask as a job has it."""

    mask: dict[str, Any]
    origin: Node
    notes: tuple[str, ...] = ()


def lay(value: MaskValue, place: Place) -> Laid:
    """The job's `mask`. Raises `Refused` where no mask of a job has the same pixels."""
    source = value.source
    if isinstance(source, FromPad):
        laid = _from_pad(source, value, place)
    elif isinstance(source, FromText):
        laid = _from_text(source, value, place)
    else:
        laid = _from_file(source, value, place)
    if value.ops:
        laid.mask["ops"] = [placed.op.model_dump(mode="json") for placed in value.ops]
    return laid


def _from_pad(source: FromPad, value: MaskValue, place: Place) -> Laid:
    before = [placed for placed in source.picture.ops[:-1] if isinstance(placed.op, Pad) and placed.op.adds]
    if before:
        place.node.refuse(
            "mask",
            f"is what {source.picture.node.said} added, but {before[0].node.said} has added to the picture, "
            "too; the job's mask would be both",
            allowed="one Pad Image for Outpainting",
        )
    own = len(source.picture.ops)
    canvas = place.canvas
    later = canvas.ops[own:]
    if canvas.file != source.picture.file or canvas.ops[:own] != source.picture.ops:
        place.node.refuse(
            "mask", f"is of the picture that {source.picture.node.said} made, which is not the one repainted"
        )
    if later and not _survives(value, later, place):
        _refuse_scaled(place, later)
    return Laid({"from": "pad"}, source.picture.node)


def _from_text(source: FromText, value: MaskValue, place: Place) -> Laid:
    if source.picture != place.canvas:
        place.node.refuse(
            "mask",
            f"was found by {value.node.said} in another picture than the one repainted; "
            "a job looks at its canvas",
            allowed="CLIPSeg on the picture that is encoded",
        )
    mask = {
        "from": "clipseg",
        "text": source.text,
        "threshold": source.threshold,
        "dilation_factor": source.dilation_factor,
        "blur": source.blur,
    }
    note = (
        f"{value.node.said}: where nothing is found, the job goes on with an empty mask, as ComfyUI does. "
        'Set mask.on_empty to "skip" or "full" for another end'
    )
    return Laid(mask, value.node, (note,))


def _from_file(source: FromFile, value: MaskValue, place: Place) -> Laid:
    own = source.file == place.canvas.file
    notes = _notes(source, value, own=own)
    size, steps = place.size_of(source.file), _changing(place.canvas.ops)
    if not steps:
        _require_size(size, place.source_size, place, "picture")
        return Laid(_file_mask(source, "source", own=own), value.node, notes)
    canvas = place.canvas_size
    if size is not None and size == canvas:
        return Laid(_file_mask(source, "canvas", own=own), value.node, notes)
    if own or (size is not None and size == place.source_size):
        if not _survives(value, steps, place):
            _refuse_scaled(place, steps)
        return Laid(_file_mask(source, "source", own=own), value.node, notes)
    _require_size(size, canvas, place, "prepared picture")
    unknown = (
        f"{place.node.said}.mask: sizes are not known here; {source.file!r} must have the prepared "
        "picture's, else the job fails"
    )
    return Laid(_file_mask(source, "canvas", own=own), value.node, (*notes, unknown))


def _file_mask(source: FromFile, at: str, *, own: bool) -> dict[str, Any]:
    if own and source.loaded and at == "source":
        return {"from": "alpha"}
    return {"from": "image", "image": source.file, "channel": source.channel, "at": at}


def _notes(source: FromFile, value: MaskValue, *, own: bool) -> tuple[str, ...]:
    if not source.loaded:
        return ()
    notes = []
    if not own:
        notes.append(f"{value.node.said}: {COLOUR_KEY}")
    if any(isinstance(placed.op, Invert) for placed in value.ops) and len(value.ops) > 1:
        notes.append(f"{value.node.said}: {NO_ALPHA}")
    return tuple(notes)


def _require_size(size: Size | None, wanted: Size | None, place: Place, what: str) -> None:
    if size is not None and wanted is not None and size != wanted:
        place.node.refuse(
            "mask",
            f"has {size[0]} x {size[1]} pixels and the {what} {wanted[0]} x {wanted[1]}; ComfyUI would "
            "stretch it, a job never does",
            allowed=f"a mask of {wanted[0]} x {wanted[1]} pixels",
        )


def _changing(ops: tuple[Placed, ...]) -> tuple[Placed, ...]:
    """The operations that do anything to a picture's frame."""
    return tuple(
        placed
        for placed in ops
        if not (isinstance(placed.op, Scale) and placed.op.width == placed.op.height == 0)
    )


def _survives(value: MaskValue, steps: tuple[Placed, ...], place: Place) -> bool:
    """Whether the mask, carried through these operations, is the mask that the reference scales."""
    if len(steps) != 1 or not place.is_scaled:
        return False
    op = steps[0].op
    plain = isinstance(op, ScaleBy) or (isinstance(op, Scale) and op.crop == "disabled")
    return plain and all(isinstance(placed.op, Invert) for placed in value.ops)


def _refuse_scaled(place: Place, steps: tuple[Placed, ...]) -> NoReturn:
    changers = ", ".join(placed.node.said for placed in steps[:5])
    why = (
        "Set Latent Noise Mask takes it as it is"
        if not place.is_scaled
        else "it is stretched to the new frame, after what was done to it"
    )
    place.node.refuse(
        "mask",
        f"belongs to the picture before {changers}, and in ComfyUI {why}; in a job it goes through `prepare` "
        "with the picture, so the result would be another",
        allowed="a mask made for the prepared picture (Load Image (as Mask) of its size), or no change of "
        "the picture between Load Image and the node that encodes it",
    )
