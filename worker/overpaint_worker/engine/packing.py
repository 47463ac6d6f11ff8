"""From the decoded picture to the job's files: original put back, finishing operations, encoding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from overpaint_shared.errors import JobError
from overpaint_shared.job import JobSpec, Output
from overpaint_shared.settings import Limits
from overpaint_worker.engine import canvas, certificate, composite, encode, masks, picture, provenance
from overpaint_worker.engine.certificate import Certificate
from overpaint_worker.engine.deep_png import Samples
from overpaint_worker.engine.encode import Spared
from overpaint_worker.engine.geometry import Geometry
from overpaint_worker.engine.picture import Stored
from overpaint_worker.engine.preparation import Prepared


@dataclass(frozen=True, eq=False)
class _Layers:
    """A result with what belongs to each of its pixels."""

    rgb: Tensor
    alpha: Tensor | None
    spared: Spared | None
    original: Tensor
    """The canvas [H, W, 3], taken the same way."""
    mask: Tensor | None
    """[H, W], taken the same way."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A job's picture files and what was measured on them."""

    files: dict[str, bytes]
    width: int
    height: int
    certificate: Certificate | None
    """None where there is no mask."""
    pixels: str
    """`provenance.pixel_digest` of the picture."""

    @property
    def image(self) -> str:
        """The name of the picture among the files."""
        return next(name for name in self.files if name.startswith("image."))


def pack(
    spec: JobSpec,
    ready: Prepared,
    rendered: Tensor | None,
    limits: Limits,
    text: Mapping[str, str] | None = None,
) -> Packed:
    """Make the files of a job from the decoded picture [1, 3, h, w], 0..1, of the model's size.

    None: nothing was rendered, and the canvas is the result.

    Raises:
        JobError: more changed outside the mask than `preserve` allows.
        InputError: a finishing operation does not fit, or the format cannot hold the result.

    """
    result = _result(ready, rendered)
    layers = _finished(spec, ready, _composed(spec, ready, result), limits)
    compat = spec.compat == "comfyui"
    image = encode.encode(
        layers.rgb, spec.output, ready.canvas.icc, layers.alpha, _marked(ready, text),
        depth=ready.canvas.depth, spared=layers.spared, compat=compat,
    )  # fmt: skip
    written = picture.read_back(image)
    certificate = _certified(spec, ready, layers, written, result)
    _check_preserved(spec, certificate)
    files = {f"image.{spec.output.format}": image}
    if spec.output.previews:
        files |= previews(ready)
    height, width = written.samples.shape[:2]
    return Packed(files, width, height, certificate, provenance.samples_digest(written.samples))


def _result(ready: Prepared, rendered: Tensor | None) -> Tensor:
    """[H, W, 3] of the result's size, no original put back."""
    if rendered is None:
        return ready.kept(ready.canvas.rgb)
    return ready.result(rendered[0].permute(1, 2, 0).to("cpu", torch.float32))


def _marked(ready: Prepared, text: Mapping[str, str] | None) -> dict[str, str]:
    """The notes, and how the picture came to be, unless nothing of it was generated."""
    mark = provenance.xmp_packet(provenance.source_type(ready.kept_mask))
    return {**(text or {}), **({} if ready.skipped else {encode.XMP_KEY: mark})}


def previews(ready: Prepared) -> dict[str, bytes]:
    """The mask in grey, and a heat map for each text: `heatmap.png`, `heatmap-2.png`, ..."""
    files = {} if ready.kept_mask is None else {"mask.png": mask_png(ready.kept_mask)}
    return files | heat_files(ready.findings.heat_maps(ready.canvas.rgb, ready.kept))


def heat_files(maps: Iterable[Tensor]) -> dict[str, bytes]:
    """Heat maps [H, W, 3] as files, by their names."""
    return {
        "heatmap.png" if number == 1 else f"heatmap-{number}.png": encode.encode(each, Output())
        for number, each in enumerate(maps, start=1)
    }


def mask_png(mask: Tensor) -> bytes:
    """A mask [H, W] as a grey picture."""
    return encode.grey_png(mask)


def _composed(spec: JobSpec, ready: Prepared, result: Tensor) -> _Layers:
    """The original back outside the mask, where that is asked for."""
    mask = ready.kept_mask
    alpha = None if ready.canvas.alpha is None else ready.kept(ready.canvas.alpha)
    alpha = encode.alpha_out(alpha, mask)
    original = ready.kept(ready.canvas.rgb)
    if mask is None or not (spec.composite or ready.skipped):
        return _Layers(result, alpha, None, original, mask)
    rgb = composite.composite(original, result, mask)
    return _Layers(rgb, alpha, _spared(ready, mask), original, mask)


def _spared(ready: Prepared, mask: Tensor) -> Spared | None:
    samples = ready.canvas.samples
    if samples is None:
        return None
    kept = ready.kept(cast("Tensor", samples))  # only slices, which arrays do alike
    return Spared(cast("Samples", kept), (mask == 0).numpy())


def _finished(spec: JobSpec, ready: Prepared, layers: _Layers, limits: Limits) -> _Layers:
    if not spec.finish:
        return layers
    depth = ready.canvas.depth
    rgb, geometry = canvas.finish(
        layers.rgb, spec.finish, limits, compat=spec.compat == "comfyui", depth=depth
    )
    alpha, mask = (
        None if plane is None else geometry.carry(plane, "finish") for plane in (layers.alpha, layers.mask)
    )
    original = geometry.picture(layers.original, depth)
    return _Layers(rgb, alpha, _still_spared(layers.spared, geometry), original, mask)


def _still_spared(spared: Spared | None, geometry: Geometry) -> Spared | None:
    """The file's own pixels, while the finishing operations only crop and extend."""
    samples = geometry.samples(spared.samples) if spared else None
    if spared is None or samples is None:
        return None
    where = geometry.carry(torch.from_numpy(spared.where).to(torch.float32), "finish")
    return Spared(samples, (where == 1).numpy())


def _certified(
    spec: JobSpec, ready: Prepared, layers: _Layers, written: Stored, result: Tensor
) -> Certificate | None:
    """Compare what was written with the canvas, as anyone could who has both files.

    What finishing operations scale is compared with the canvas scaled alike.
    """
    mask, kept_mask = layers.mask, ready.kept_mask
    if mask is None or kept_mask is None or ready.mask is None:
        return None
    after, before = _levels(spec, layers, written)
    near = certificate.surroundings(mask)
    seen, original, mask_near = written.colours(*near), layers.original[near], mask[near]
    return Certificate(
        coverage=masks.coverage(ready.mask),
        outside=certificate.outside(after, before, mask, np.iinfo(after.dtype).max),
        ring=certificate.ring_shift(seen, original, mask_near),
        ring_rendered=certificate.ring_shift(result, ready.kept(ready.canvas.rgb), kept_mask),
        seam=certificate.seam_contrast(seen, mask_near),
        seam_before=certificate.seam_contrast(original, mask_near),
    )


def _levels(spec: JobSpec, layers: _Layers, written: Stored) -> tuple[Samples, Samples]:
    """File and canvas in whole levels of sRGB [H, W, 3]; what a file holds is not computed anew."""
    depth: Literal[8, 16] = 16 if written.samples.dtype == np.uint16 else 8
    compat, spared = spec.compat == "comfyui", layers.spared
    after = written.samples[..., :3] if written.space is None else encode.quantise(written.colours(), depth)
    same = written.space is None and not compat and spared is not None and spared.samples.dtype == after.dtype
    before = spared.samples if same and spared else encode.quantise(layers.original, depth, truncate=compat)
    return after, before


def _check_preserved(spec: JobSpec, measured: Certificate | None) -> None:
    outside = measured.outside if measured else None
    if spec.preserve is None or outside is None or outside.largest <= spec.preserve.max_outside:
        return
    raise JobError(
        f"the picture changed by up to {outside.largest:g} levels outside the mask",
        field="preserve.max_outside", value=spec.preserve.max_outside,
        fix='set "composite": true and leave scaling out of `finish`, or allow more',
    )  # fmt: skip
