"""What a job needs before any diffusion model: pictures decoded, canvas, mask, region, the method's start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from overpaint_shared.job import JobSpec, OnlyMasked
from overpaint_shared.settings import Limits
from overpaint_worker.engine import canvas, encode, masks, methods, sizing
from overpaint_worker.engine.album import Album
from overpaint_worker.engine.canvas import Canvas
from overpaint_worker.engine.clipseg.findings import Findings
from overpaint_worker.engine.decoding import Decode, decode
from overpaint_worker.engine.geometry import Size
from overpaint_worker.engine.methods import Hint, Scene, Start, fit_hint
from overpaint_worker.engine.picture import Picture
from overpaint_worker.engine.region import Region, around
from overpaint_worker.engine.sizing import Fit

Place = Callable[[Tensor], Tensor]


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
    album: Album
    """The pictures that it still needs."""

    def mask(self, findings: Findings | None = None) -> Tensor | None:
        """The mask [H, W] on the canvas; None: everywhere. `findings`: what the texts of the job found.

        Raises:
            MaskError: as `prepare`. NothingToRepaint: nothing was found, which the job wants skipped.

        """
        if self.spec.mask is None:
            return None
        found, size = findings or Findings(), self.canvas.size
        return masks.build(
            self.spec.mask, self.source, self.canvas, self.album.mask,
            lambda _, path: found.mask(path, size.width, size.height),
            compat=self.spec.compat == "comfyui",
        )  # fmt: skip


def begin(opened: Opened, limits: Limits, findings: Findings | None = None) -> Prepared:
    """Make the mask and the method's start, and check everything that the pictures tell.

    Raises:
        InputError: a picture is missing, is none, or is beyond a limit; the format cannot hold the result.
        MaskError: the mask does not fit, covers too little or too much, or vanishes at the latent's size.
        UnsupportedError: this version does not have the method.

    """
    spec, made = opened.spec, opened.canvas
    try:
        mask = opened.mask(findings)
    except masks.NothingToRepaint:
        return _as_it_was(opened, findings)
    region = None
    if isinstance(spec.region, OnlyMasked) and mask is not None:
        region = around(mask, spec.region, limits.max_output_pixels)
    scene = _scene(spec, made, mask, region)
    fit, start = scene.fit, methods.begin(spec.method.kind, scene)
    if start.noise_mask is not None:
        width, height = fit.model
        masks.check_survives(start.noise_mask, width // sizing.MULTIPLE, height // sizing.MULTIPLE)
    place = _place(spec, fit, made.size, region)
    hints, notes = _hints(spec, opened.album, made.size, place)
    ready = Prepared(
        opened.source, made, mask, fit, start, (*start.hints, *hints), (*opened.source.notes, *notes),
        region, findings or Findings(),
    )  # fmt: skip
    _check_format(spec, ready)
    return ready


def _check_format(spec: JobSpec, ready: Prepared) -> None:
    if not spec.finish:
        alpha, canvas_ = encode.alpha_out(ready.canvas.alpha, ready.mask), ready.kept(ready.canvas.rgb)
        encode.check(spec.output, canvas_.shape[1], canvas_.shape[0], alpha)


def _scene(spec: JobSpec, made: Canvas, mask: Tensor | None, region: Region | None) -> Scene:
    """What the method sees: the canvas, or a part of it, which the reference knows nothing of."""
    compat = spec.compat == "comfyui"
    if region is None or mask is None:
        fit = sizing.centre_crop(made.size) if compat else sizing.pad_to_multiple(made.size)
        return Scene(picture=made.rgb, mask=mask, method=spec.method, fit=fit, compat=compat)
    fit = sizing.pad_to_multiple(region.work)
    return Scene(
        picture=region.cut(made.rgb), mask=region.cut_mask(mask), method=spec.method, fit=fit, compat=False
    )


def _as_it_was(opened: Opened, findings: Findings | None) -> Prepared:
    """For a job in which nothing is to be repainted: its canvas under an empty mask."""
    spec, made = opened.spec, opened.canvas
    mask = torch.zeros(made.size.height, made.size.width)
    fit = _scene(spec, made, None, None).fit
    ready = Prepared(
        opened.source, made, mask, fit, Start(fit.to_model(made.rgb), noise_mask=None), (),
        (*opened.source.notes, "nothing was found, so nothing was repainted"),
        findings=findings or Findings(), skipped=True,
    )  # fmt: skip
    _check_format(spec, ready)
    return ready


def open_pictures(
    spec: JobSpec, inputs: Mapping[str, bytes], limits: Limits, decode: Decode = decode
) -> Opened:
    """Decode the pictures and make the canvas. Raises `InputError`, `MaskError` as `begin`.

    `inputs` maps each picture reference of the spec to the encoded file.
    """
    album = Album(spec, inputs, limits, decode)
    source = album.source()
    made = canvas.prepare(source, spec.prepare, limits, compat=spec.compat == "comfyui")
    album.read_masks()
    return Opened(spec, source, made, album)


def _hints(spec: JobSpec, album: Album, canvas_size: Size, place: Place) -> tuple[list[Hint], list[str]]:
    """What `controls` show their ControlNets, and a note for each that was not made for the canvas.

    `place` brings a hint [H, W, 3] of any size to the model's.
    """
    hints, notes = list[Hint](), list[str]()
    placed: dict[str, tuple[Size, Tensor]] = {}
    for i, control in enumerate(spec.controls):
        where = f"controls[{i}].image"
        if control.image not in placed:
            opened = album.control(control.image, where)
            placed[control.image] = Size(opened.width, opened.height), place(opened.rgb)
        size, hint = placed[control.image]
        if size != canvas_size:
            notes.append(f"{where} was scaled from {size} to the canvas, {canvas_size}")
        hints.append(
            Hint(
                controlnet=control.controlnet, picture=hint,
                strength=control.strength, start=control.start, end=control.end,
                field=f"controls[{i}].controlnet",
            )
        )  # fmt: skip
    return hints, notes


def _place(spec: JobSpec, fit: Fit, size: Size, region: Region | None) -> Place:
    """How a hint made for the canvas comes to the model's size: of a region, that part of it."""

    def place(hint: Tensor) -> Tensor:
        if region is None:
            return fit_hint(hint, fit, compat=spec.compat == "comfyui")
        return fit.to_model(region.cut(fit_hint(hint, Fit(size, size, 0, 0), compat=False)))

    return place
