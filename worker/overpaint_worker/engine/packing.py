"""From the decoded picture to the job's files: original put back, finishing operations, encoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from overpaint_shared.errors import JobError
from overpaint_shared.job import JobSpec, Output
from overpaint_shared.settings import Limits
from overpaint_worker.engine import canvas, composite, encode, picture
from overpaint_worker.engine.deep_png import Samples
from overpaint_worker.engine.encode import Spared
from overpaint_worker.engine.geometry import Geometry
from overpaint_worker.engine.preparation import Prepared


@dataclass(frozen=True)
class Outside:
    """How much changed where the mask is 0, measured on the encoded file."""

    largest: int
    """Largest difference to the original, 8-bit levels."""
    changed: float
    """Share of those pixels that differ at all."""

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        return {"largest_change": self.largest, "changed_share": round(self.changed, 6)}


@dataclass(frozen=True, eq=False)
class _Layers:
    """A result with what belongs to each of its pixels."""

    rgb: Tensor
    alpha: Tensor | None
    spared: Spared | None


@dataclass(frozen=True, eq=False)
class Packed:
    """A job's picture files and what was measured on them."""

    files: dict[str, bytes]
    width: int
    height: int
    outside: Outside | None


def pack(
    spec: JobSpec, ready: Prepared, rendered: Tensor, limits: Limits, text: Mapping[str, str] | None = None
) -> Packed:
    """Make the files of a job from the decoded picture [1, 3, h, w], 0..1, of the model's size.

    Raises:
        JobError: more changed outside the mask than `preserve` allows.
        InputError: a finishing operation does not fit, or the format cannot hold the result.

    """
    result = ready.fit.from_model(rendered[0].permute(1, 2, 0).to("cpu", torch.float32))
    layers = _finished(spec, ready, _composed(spec, ready, result), limits)
    compat = spec.compat == "comfyui"
    image = encode.encode(
        layers.rgb, spec.output, ready.canvas.icc, layers.alpha, text,
        depth=ready.canvas.depth, spared=layers.spared, compat=compat,
    )  # fmt: skip
    outside = None if spec.finish else _outside(ready, image)
    _check_preserved(spec, outside)
    files = {f"image.{spec.output.format}": image}
    if ready.kept_mask is not None and spec.output.previews:
        files["mask.png"] = mask_png(ready.kept_mask)
    return Packed(files, layers.rgb.shape[1], layers.rgb.shape[0], outside)


def mask_png(mask: Tensor) -> bytes:
    """A mask [H, W] as a grey picture."""
    return encode.encode(mask.unsqueeze(-1).expand(-1, -1, 3), Output())


def _composed(spec: JobSpec, ready: Prepared, result: Tensor) -> _Layers:
    """The original back outside the mask, where that is asked for."""
    mask = ready.kept_mask
    alpha = None if ready.canvas.alpha is None else ready.fit.kept(ready.canvas.alpha)
    alpha = encode.alpha_out(alpha, mask)
    if mask is None or not spec.composite:
        return _Layers(result, alpha, None)
    original = ready.fit.kept(ready.canvas.rgb)
    return _Layers(composite.composite(original, result, mask), alpha, _spared(ready, mask))


def _spared(ready: Prepared, mask: Tensor) -> Spared | None:
    samples = ready.canvas.samples
    if samples is None:
        return None
    kept = ready.fit.kept(cast("Tensor", samples))  # only slices, which arrays do alike
    return Spared(cast("Samples", kept), (mask == 0).numpy())


def _finished(spec: JobSpec, ready: Prepared, layers: _Layers, limits: Limits) -> _Layers:
    if not spec.finish:
        return layers
    depth = ready.canvas.depth
    rgb, geometry = canvas.finish(
        layers.rgb, spec.finish, limits, compat=spec.compat == "comfyui", depth=depth
    )
    alpha = None if layers.alpha is None else geometry.carry(layers.alpha, "finish")
    return _Layers(rgb, alpha, _still_spared(layers.spared, geometry))


def _still_spared(spared: Spared | None, geometry: Geometry) -> Spared | None:
    """The file's own pixels, while the finishing operations only crop and extend."""
    samples = geometry.samples(spared.samples) if spared else None
    if spared is None or samples is None:
        return None
    where = geometry.carry(torch.from_numpy(spared.where).to(torch.float32), "finish")
    return Spared(samples, (where == 1).numpy())


def _outside(ready: Prepared, image: bytes) -> Outside | None:
    """Compare what was written with the canvas, as anyone could who has both files."""
    mask = ready.kept_mask
    if mask is None or not bool((mask == 0).any()):
        return None
    own = Limits(max_input_bytes=len(image), max_pixels=mask.numel())
    written = encode.quantise(picture.load(image, own, "image").rgb)
    original = encode.quantise(ready.fit.kept(ready.canvas.rgb))
    change = torch.from_numpy(written).to(torch.int16) - torch.from_numpy(original).to(torch.int16)
    spared = change.abs().amax(-1)[mask == 0]
    return Outside(int(spared.max()), float((spared > 0).to(torch.float64).mean()))


def _check_preserved(spec: JobSpec, outside: Outside | None) -> None:
    if spec.preserve is None or outside is None or outside.largest <= spec.preserve.max_outside:
        return
    raise JobError(
        f"the picture changed by up to {outside.largest} levels outside the mask",
        field="preserve.max_outside", value=spec.preserve.max_outside,
        fix='set "composite": true, or allow more',
    )  # fmt: skip
