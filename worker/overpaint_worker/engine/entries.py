"""Whether the weights that a spec names are here and go together, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from overpaint_shared.catalogue import INPAINT_CHANNELS, difference
from overpaint_shared.errors import JobError
from overpaint_shared.job import ControlnetInpaint, InpaintModel, JobSpec
from overpaint_worker.engine.clipseg.findings import texts
from overpaint_worker.registry import Entry, Registry

if TYPE_CHECKING:
    from overpaint_worker.engine.models import ModelStore


def check_entries(spec: JobSpec, models: ModelStore) -> None:
    """Hold all that the spec names against its model, by headers alone.

    Raises:
        UnsupportedError: a name that this engine does not have.
        ModelLoadError: weights that cannot be read.
        JobError: weights that were made for another architecture.

    """
    model = models.traits(spec.model)
    for path, mask in texts(spec):
        models.registry.segmenter(mask.segmenter, f"{path}.segmenter")
    for field, entry in named(spec, models.registry):
        found = difference(models.traits_of(entry), model)
        if found is not None:
            what, its, models_own = found
            raise JobError(
                f"{entry.name!r} has the {what} {its}, and the model {spec.model!r} has {models_own}",
                field=field, value=entry.name, fix="use weights made for the model's architecture",
            )  # fmt: skip
    if isinstance(spec.method, InpaintModel) and model.channels != INPAINT_CHANNELS:
        raise JobError(
            f"the model {spec.model!r} has {model.channels} input channels, and this method needs a model "
            f"with {INPAINT_CHANNELS}",
            field="method.kind", value=spec.method.kind, fix="use an inpainting model, or another method",
        )  # fmt: skip


def named(spec: JobSpec, registry: Registry) -> Iterator[tuple[str, Entry]]:
    """Every entry but the model and segmenters, with the field that names it."""
    if isinstance(spec.method, ControlnetInpaint):
        yield "method.controlnet", registry.controlnet(spec.method.controlnet, "method.controlnet")
    for i, control in enumerate(spec.controls):
        field = f"controls[{i}].controlnet"
        yield field, registry.controlnet(control.controlnet, field)
    for i, use in enumerate(spec.loras):
        field = f"loras[{i}].name"
        yield field, registry.lora(use.name, field)
    if spec.vae is not None:
        yield "vae", registry.vae(spec.vae)
