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
from overpaint_worker.engine.geometry import Size
from overpaint_worker.engine.methods import Hint, Scene, Start, fit_hint
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
    """From the canvas, or from the region at its working size, to the model's size."""
    start: Start
    hints: tuple[Hint, ...]
    """For all ControlNets of the job: the method's, then those of `controls`."""
    notes: tuple[str, ...]
    """What a person should know, for the receipt."""
    region: Region | None = None
    """The rectangle that is worked on; None: the whole canvas."""
    findings: Findings = field(default_factory=Findings)
    skipped: bool = False
    """Nothing was found, and the canvas is to be returned as it is."""

    @property
    def kept_mask(self) -> Tensor | None:
        """The mask of the result's size: the canvas's, or its centre where the reference crops."""
        return None if self.mask is None else self.kept(self.mask)

    def kept(self, canvas: Tensor) -> Tensor:
        """What of the canvas [H, W, ...] lies under the result: all, or its centre."""
        return canvas if self.region else self.fit.kept(canvas)

    def result(self, rendered: Tensor) -> Tensor:
        """The result [H, W, 3] that a picture [h, w, 3] of the model's size makes; no original put back."""
        work = self.fit.from_model(rendered)
        return self.region.stitch(work, self.canvas.rgb) if self.region else work


@dataclass(frozen=True, eq=False)
class Opened:
    """A job's pictures, decoded, with its canvas made."""

    spec: JobSpec
    source: Picture
    canvas: Canvas
    images: Mapping[str, Tensor]
    """What the mask's own pictures hold, by the path of the mask."""

    def mask(self, findings: Findings | None = None) -> Tensor | None:
        """The mask [H, W] on the canvas; None: everywhere. `findings`: what the texts of the job found.

        Raises:
            MaskError: as `prepare`. NothingToRepaint: nothing was found, which the job wants skipped.

        """
        if self.spec.mask is None:
            return None
        found, size = findings or Findings(), self.canvas.size
        return masks.build(
            self.spec.mask, self.source, self.canvas, self.images,
            lambda _, path: found.mask(path, size.width, size.height),
            compat=self.spec.compat == "comfyui",
        )  # fmt: skip


def begin(
    opened: Opened, inputs: Mapping[str, bytes], limits: Limits, findings: Findings | None = None
) -> Prepared:
    """Make the mask and the method's start, and check everything that the pictures tell.

    `inputs` maps each picture reference of the spec to the encoded file.

    Raises:
        InputError: a picture is missing, is none, or is beyond a limit; the format cannot hold the result.
        MaskError: the mask does not fit, covers too little or too much, or vanishes at the latent's size.
        UnsupportedError: this version does not have the method.

    """
    spec, made, compat = opened.spec, opened.canvas, opened.spec.compat == "comfyui"
    try:
        mask = opened.mask(findings)
    except masks.NothingToRepaint:
        return _as_it_was(opened, findings)
    region = _region(spec, mask, limits)
    picture_, mask_ = (made.rgb, mask) if region is None else (region.cut(made.rgb), region.cut_mask(_there(mask)))
    fit = _fit(spec, made, region)
    start = methods.begin(
        spec.method.kind, Scene(picture=picture_, mask=mask_, method=spec.method, fit=fit, compat=compat)
    )
    if start.noise_mask is not None:
        width, height = fit.model
        masks.check_survives(start.noise_mask, width // sizing.MULTIPLE, height // sizing.MULTIPLE)
    hints, notes = _hints(spec, inputs, limits, fit)
    ready = Prepared(
        opened.source, made, mask, fit, start, (*start.hints, *hints), (*opened.source.notes, *notes),
        region, findings or Findings(),
    )  # fmt: skip
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


def _hints(
    spec: JobSpec, inputs: Mapping[str, bytes], limits: Limits, fit: Fit
) -> tuple[list[Hint], list[str]]:
    """What `controls` show their ControlNets, and a note for each that was not made for the canvas."""
    compat, hints, notes = spec.compat == "comfyui", list[Hint](), list[str]()
    for i, control in enumerate(spec.controls):
        field = f"controls[{i}].image"
        opened = picture.load(_input(inputs, control.image, field), limits, field, compat=compat)
        size = Size(opened.rgb.shape[1], opened.rgb.shape[0])
        if size != fit.canvas:
            notes.append(f"{field} was scaled from {size} to the canvas, {fit.canvas}")
        hints.append(
            Hint(
                controlnet=control.controlnet, picture=fit_hint(opened.rgb, fit, compat=compat),
                strength=control.strength, start=control.start, end=control.end,
                field=f"controls[{i}].controlnet",
            )
        )  # fmt: skip
    return hints, notes


def _input(inputs: Mapping[str, bytes], reference: str, field: str) -> bytes:
    if reference not in inputs:
        raise InputError("the picture was not sent", field=field, value=reference, fix="submit the job again")
    return inputs[reference]
