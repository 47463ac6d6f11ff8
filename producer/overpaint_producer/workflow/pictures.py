"""Nodes on pictures and masks."""

import re
from typing import get_args

from overpaint_producer.workflow.graph import Node
from overpaint_producer.workflow.values import (
    FromFile,
    FromPad,
    FromText,
    Hint,
    MaskOp,
    MaskValue,
    Picture,
    PictureOp,
    Shown,
    Value,
)
from overpaint_producer.workflow.walk import Walk, kind
from overpaint_shared.job import Crop, FeatherBorders, Filter, Grow, Invert, Pad, Scale, ScaleBy

LARGEST = 16_384
FILTERS = get_args(Filter)

_FOLDER = re.compile(r" \[(input|output|temp)\]$")


def _file(node: Node) -> str:
    """The picture's file name; the editor may add which of its folders it lies in."""
    name = node.file("image")
    folder = _FOLDER.search(name)
    if folder and folder[1] != "input":
        node.refuse(
            "image",
            f"lies in ComfyUI's {folder[1]} folder, not in its input folder",
            given=f'"{name}"',
            allowed="a picture of the input folder: copy it there",
        )
    return name[: folder.start()] if folder else name


def load(_: Walk, node: Node) -> tuple[Value, ...]:
    """Load Image: the picture without its transparency, and the transparency as a mask."""
    file = _file(node)
    picture = Picture(file=file, ops=(), node=node, loader=node)
    return picture, MaskValue(source=FromFile(file, "alpha", loaded=True), ops=(), node=node)


def load_mask(_: Walk, node: Node) -> tuple[Value, ...]:
    """Load Image (as Mask)."""
    file = _file(node)
    for channel in ("red", "green", "blue", "alpha"):
        if node.choice("channel", ("alpha", "red", "green", "blue")) == channel:
            return (MaskValue(source=FromFile(file, channel, loaded=False), ops=(), node=node),)
    raise AssertionError(node.said)  # `choice` lets nothing else through


def scale(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Upscale Image."""
    crop = node.choice("crop", ("disabled", "center"))
    op = Scale(
        width=node.whole("width", 0, LARGEST),
        height=node.whole("height", 0, LARGEST),
        filter=node.choice("upscale_method", FILTERS),  # type: ignore[arg-type]
        crop="center" if crop == "center" else "disabled",
    )
    return (_then(walk, node, op),)


def scale_by(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Upscale Image By."""
    op = ScaleBy(
        factor=node.number("scale_by", 0.01, 8),
        filter=node.choice("upscale_method", FILTERS),  # type: ignore[arg-type]
    )
    return (_then(walk, node, op),)


def crop(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Image Crop."""
    op = Crop(
        x=node.whole("x", 0, LARGEST),
        y=node.whole("y", 0, LARGEST),
        width=node.whole("width", 1, LARGEST),
        height=node.whole("height", 1, LARGEST),
    )
    return (_then(walk, node, op),)


def pad(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Pad Image for Outpainting: the larger picture, and the mask of what was added."""
    left, top, right, bottom = _sides(node)
    feathering = node.whole("feathering", 0, LARGEST)
    op = Pad(left=left, top=top, right=right, bottom=bottom, feathering=feathering)
    image = walk.image(node, "image")
    if not isinstance(image, Picture):
        node.refuse(
            "image", f"comes from {image.node.said}; a job pads its source only", allowed="Load Image"
        )
    padded = image.then(op, node)
    return padded, MaskValue(source=FromPad(padded), ops=(), node=node)


def _then(walk: Walk, node: Node, op: PictureOp) -> Value:
    image = walk.image(node, "image")
    if isinstance(image, Hint | Shown):
        node.refuse("image", f"comes from {image.node.said}, whose picture a job cannot change further")
    return image.then(op, node)


def clipseg(walk: Walk, node: Node) -> tuple[Value, ...]:
    """CLIPSeg: the mask, and two pictures of it."""
    image = walk.image(node, "image")
    if not isinstance(image, Picture):
        node.refuse(
            "image", f"comes from {image.node.said}; a job looks at its own canvas", allowed="Load Image"
        )
    words = node.text("text")
    if not 1 <= len(words) <= 256 or not words.isprintable():
        node.refuse("text", "is no line of text", given=f'"{words[:40]}"', allowed="1 to 256 characters")
    source = FromText(
        picture=image,
        text=words,
        threshold=node.number("threshold", 0, 1, 0.4),
        dilation_factor=node.whole("dilation_factor", 0, 10, 4),
        blur=node.number("blur", 0, 15, 7.0),
    )
    return MaskValue(source=source, ops=(), node=node), Shown(node), Shown(node)


def grow(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Grow Mask."""
    op = Grow(by=node.whole("expand", -LARGEST, LARGEST), tapered=node.flag("tapered_corners"))
    return (_mask_then(walk, node, op),)


def feather(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Feather Mask."""
    left, top, right, bottom = _sides(node)
    return (_mask_then(walk, node, FeatherBorders(left=left, top=top, right=right, bottom=bottom)),)


def _sides(node: Node) -> tuple[int, int, int, int]:
    left, top, right, bottom = (node.whole(name, 0, LARGEST) for name in ("left", "top", "right", "bottom"))
    return left, top, right, bottom


def invert(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Invert Mask."""
    return (_mask_then(walk, node, Invert()),)


def _mask_then(walk: Walk, node: Node, op: MaskOp) -> Value:
    return walk.take(node, "mask", MaskValue).then(op, node)


def inpaint_preprocessor(walk: Walk, node: Node) -> tuple[Value, ...]:
    """The hint of an inpainting ControlNet."""
    if node.flag("black_pixel_for_xinsir_cn", default=False):
        node.refuse(
            "black_pixel_for_xinsir_cn",
            "paints the hint black instead of -1, which a job cannot say",
            given="true",
            allowed="false",
        )
    image = walk.image(node, "image")
    if not isinstance(image, Picture):
        node.refuse("image", f"comes from {image.node.said}; a job's hint is made of its canvas")
    return (Hint(picture=image, mask=walk.take(node, "mask", MaskValue), node=node),)


KINDS = {
    "LoadImage": kind(load, "image", "`source`, a mask or a hint"),
    "LoadImageMask": kind(load_mask, "image channel", '`mask` from "image"'),
    "ImageScale": kind(scale, "image upscale_method width height crop", "`scale` in `prepare` or `finish`"),
    "ImageScaleBy": kind(scale_by, "image upscale_method scale_by", "`scale_by` in `prepare` or `finish`"),
    "ImageCrop": kind(crop, "image width height x y", "`crop` in `prepare` or `finish`"),
    "ImagePadForOutpaint": kind(
        pad, "image left top right bottom feathering", '`pad` in `prepare`, `mask` from "pad"'
    ),
    "CLIPSeg": kind(clipseg, "image text blur threshold dilation_factor", '`mask` from "clipseg"'),
    "GrowMask": kind(grow, "mask expand tapered_corners", "`grow` in `mask.ops`"),
    "FeatherMask": kind(feather, "mask left top right bottom", "`feather_borders` in `mask.ops`"),
    "InvertMask": kind(invert, "mask", "`invert` in `mask.ops`"),
    "InpaintPreprocessor": kind(
        inpaint_preprocessor, "image mask black_pixel_for_xinsir_cn", "the hint of `controlnet_inpaint`"
    ),
}
