"""What a job needs before any diffusion model: pictures decoded, canvas, mask, the method's start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from overpaint_shared.errors import InputError
from overpaint_shared.job import ImageMask, JobSpec
from overpaint_shared.settings import Limits
from overpaint_shared.spec.masks import leaves
from overpaint_worker.engine import canvas, encode, masks, methods, picture, sizing
from overpaint_worker.engine.canvas import Canvas
from overpaint_worker.engine.methods import Scene, Start
from overpaint_worker.engine.picture import Picture
from overpaint_worker.engine.sizing import Fit


@dataclass(frozen=True, eq=False)
class Prepared:
    """A job's pictures, ready to be encoded."""

    source: Picture
    canvas: Canvas
    mask: Tensor | None
    """float32 [H, W] of the canvas, 1 = repaint, before any method grows it; None: everywhere."""
    fit: Fit
    start: Start
    notes: tuple[str, ...]
    """What a person should know, for the receipt."""

    @property
    def kept_mask(self) -> Tensor | None:
        """The mask of the result's size: the canvas's, or its centre where the reference crops."""
        return None if self.mask is None else self.fit.kept(self.mask)


def prepare(spec: JobSpec, inputs: Mapping[str, bytes], limits: Limits) -> Prepared:
    """Decode and check everything that the pictures tell.

    `inputs` maps each picture reference of the spec to the encoded file.

    Raises:
        InputError: a picture is missing, is none, or is beyond a limit; the format cannot hold the result.
        MaskError: the mask does not fit, covers too little or too much, or vanishes at the latent's size.
        UnsupportedError: this version does not have the method.

    """
    compat = spec.compat == "comfyui"
    source, made, mask = open_pictures(spec, inputs, limits)
    fit = sizing.centre_crop(made.size) if compat else sizing.pad_to_multiple(made.size)
    scene = Scene(picture=made.rgb, mask=mask, method=spec.method, fit=fit, compat=compat)
    start = methods.begin(spec.method.kind, scene)
    if start.noise_mask is not None:
        width, height = fit.model
        masks.check_survives(start.noise_mask, width // sizing.MULTIPLE, height // sizing.MULTIPLE)
    ready = Prepared(source, made, mask, fit, start, source.notes)
    alpha = encode.alpha_out(made.alpha, mask)
    if not spec.finish:
        encode.check(spec.output, fit.output.width, fit.output.height, alpha)
    return ready


def open_pictures(
    spec: JobSpec, inputs: Mapping[str, bytes], limits: Limits
) -> tuple[Picture, Canvas, Tensor | None]:
    """The source, the canvas made of it, and the mask [H, W] on the canvas. Raises as `prepare`."""
    compat = spec.compat == "comfyui"
    source = picture.load(
        _input(inputs, spec.source.image, "source.image"), limits, "source.image", compat=compat
    )
    made = canvas.prepare(source, spec.prepare, limits, compat=compat)
    if spec.mask is None:
        return source, made, None
    images: dict[str, torch.Tensor] = {}
    for path, part in leaves(spec.mask):
        if isinstance(part, ImageMask):
            where = f"{path}.image"
            data = _input(inputs, part.image, where)
            images[path] = picture.load_mask(data, limits, where, part.channel, compat=compat)
    return source, made, masks.build(spec.mask, source, made, images, compat=compat)


def _input(inputs: Mapping[str, bytes], reference: str, field: str) -> bytes:
    if reference not in inputs:
        raise InputError("the picture was not sent", field=field, value=reference, fix="submit the job again")
    return inputs[reference]
