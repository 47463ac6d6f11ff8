"""The job spec, version 1: what a producer asks for, as a frozen value.

`parse_job` is the way in and says in words what is wrong with a spec; `JobSpec.to_json` is the way out, in
one canonical form. Every field that affects pixels is here and nowhere else.
"""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind

from overpaint_shared.errors import Problem, SpecError
from overpaint_shared.explain import explain
from overpaint_shared.spec import rules
from overpaint_shared.spec.decode import LARGEST_SPEC_BYTES, decode
from overpaint_shared.spec.features import FEATURES, features
from overpaint_shared.spec.fields import (
    LARGEST_SEED,
    NAME_PATTERN,
    LabelValue,
    Line,
    Name,
    Part,
    ReferenceKind,
    Text,
    is_name,
    nearest,
    reference_kind,
    refuse,
)
from overpaint_shared.spec.masks import (
    AlphaMask,
    Blur,
    ClipsegMask,
    CombinedMask,
    Feather,
    FeatherBorders,
    Grow,
    ImageMask,
    Invert,
    Mask,
    MaskOp,
    PadMask,
    Threshold,
    leaves,
)
from overpaint_shared.spec.methods import (
    DEFAULT_DENOISE,
    Control,
    ControlnetInpaint,
    Img2Img,
    InpaintModel,
    LatentNoiseMask,
    LoraUse,
    Method,
    VaeEncodeInpaint,
)
from overpaint_shared.spec.output import FullRegion, OnlyMasked, Output, Preserve, Region
from overpaint_shared.spec.pictures import Crop, Filter, FinishOp, Pad, PrepareOp, Scale, ScaleBy, Source
from overpaint_shared.spec.sampling import SAMPLERS, SCHEDULERS, ModelDefaults, Sampling

SPEC_VERSION = 1

Compat = Literal["none", "comfyui"]


def _no_bool(version: Any) -> Any:
    """In Python `True == 1 == 1.0`, and a Literal compares."""
    return version if type(version) is int else json.dumps(version, default=str)


def _compat_by_composite(data: dict[str, Any]) -> Compat:
    return "none" if data.get("composite", True) else "comfyui"


class JobSpec(Part):
    """One job: one source picture in, one picture out."""

    version: Annotated[Literal[1], BeforeValidator(_no_bool)] = Field(
        description="Version of the job spec: 1."
    )
    model: Name = Field(description="Name of the model in the registry.")
    loras: tuple[LoraUse, ...] = Field((), max_length=16, description="LoRAs, at most 16.")
    clip_skip: int = Field(
        0, ge=0, le=11, description="Last layers of the text encoder that are left out, 0 to 11."
    )
    vae: Name | None = Field(None, description="Name of another VAE in the registry; null: the model's own.")
    source: Source = Field(description="The picture to change.")
    prepare: tuple[PrepareOp, ...] = Field(
        (),
        max_length=32,
        description="Operations on picture and mask before rendering, in order; at most 32.",
    )
    mask: Mask | None = Field(None, description="Where to repaint; absent: the whole picture.")
    method: Method = Field(description="How to repaint.")
    controls: tuple[Control, ...] = Field(
        (), max_length=8, description="ControlNets with their hints, at most 8."
    )
    prompt: Text = Field("", description="What to paint, at most 20000 characters.")
    negative_prompt: Text = Field("", description="What not to paint, at most 20000 characters.")
    sampling: Sampling = Field(default_factory=Sampling, description="How the noise is drawn and taken away.")
    region: Region = Field(default_factory=FullRegion, description="Which part of the canvas is worked on.")
    finish: tuple[FinishOp, ...] = Field(
        (), max_length=16, description="Operations on the result, in order; at most 16."
    )
    composite: bool = Field(True, description="With a mask: put the original back outside it.")
    compat: Compat = Field(
        default_factory=_compat_by_composite,
        description="`comfyui`: the reference's own behaviour, its defects included; absent: `comfyui` where "
        "`composite` is false, else `none`.",
    )
    preserve: Preserve | None = Field(
        None, description="Fail rather than change what the mask spares; null: do not."
    )
    output: Output = Field(default_factory=Output, description="How the result is written.")
    priority: int = Field(
        5, ge=0, le=9, description="0 (first) to 9, in four classes (0-2, 3-5, 6-8, 9); orders what waits."
    )
    deadline_s: float | None = Field(
        None,
        ge=1,
        le=2_592_000,
        allow_inf_nan=False,
        description="Seconds from the submit until it fails unless it has ended, 1 to 2592000; null: none.",
    )
    group: Line | None = Field(None, description="A name to filter jobs by, 1 to 256 characters; null: none.")
    labels: Mapping[Line, LabelValue] = Field(
        default_factory=dict,
        max_length=32,
        description="Names and values to filter jobs by, at most 32 of 256 characters.",
    )

    @model_validator(mode="after")
    def _keeps_the_rules(self) -> Self:
        if broken := rules.problems(self):
            raise refuse(*broken)
        return self

    def to_json(self) -> str:
        """The canonical form: sorted keys, no spaces, every default written; `parse_job` gives it back.

        `deadline_s` is written only if it is set: older workers do not know it, and specs keep their digest.
        """
        data = self.model_dump(mode="json", by_alias=True)
        if self.deadline_s is None:
            del data["deadline_s"]
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    def image_refs(self) -> list[tuple[str, str]]:
        """Every picture that the spec names, as (path in the spec, reference)."""
        refs = [("source.image", self.source.image)]
        if self.mask is not None:
            refs += [
                (f"{path}.image", mask.image)
                for path, mask in leaves(self.mask)
                if isinstance(mask, ImageMask)
            ]
        return refs + [(f"controls[{i}].image", control.image) for i, control in enumerate(self.controls)]

    def with_images(self, new: Mapping[str, str]) -> "JobSpec":
        """The same job with references replaced; those that `new` does not hold stay. Raises SpecError."""

        def moved(reference: str) -> str:
            return new.get(reference, reference)

        try:
            for reference in new.values():
                Source(image=reference)
        except ValidationError as error:
            raise explain(error, Source, "a new reference") from None
        changes: dict[str, Any] = {
            "source": self.source.model_copy(update={"image": moved(self.source.image)})
        }
        if self.mask is not None:
            changes["mask"] = _with_mask_images(self.mask, moved)
        changes["controls"] = tuple(
            control.model_copy(update={"image": moved(control.image)}) for control in self.controls
        )
        return self.model_copy(update=changes)

    def with_seed(self, seed: int) -> "JobSpec":
        """The same job with this seed, 0 to 2**64 - 1; raises SpecError."""
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
            problem = Problem(
                path="sampling.seed",
                message="is out of range",
                given=str(seed),
                allowed=f"0 to {LARGEST_SEED}",
            )
            raise SpecError("the seed is wrong", [problem])
        return self.model_copy(update={"sampling": self.sampling.model_copy(update={"seed": seed})})

    @property
    def denoise(self) -> float:
        """How strong the job is, 0.01 to 1: its own, or its method's default."""
        given = self.sampling.denoise
        return DEFAULT_DENOISE[type(self.method)] if given is None else given

    def resolved(self, defaults: ModelDefaults) -> "JobSpec":
        """The same job with what `sampling` and `region` leave out filled in, but for the seed."""
        sampling = self.sampling
        filled = {
            name: getattr(defaults, name)
            for name in ("steps", "cfg", "sampler", "scheduler")
            if getattr(sampling, name) is None
        }
        filled["denoise"] = self.denoise
        changes: dict[str, Any] = {"sampling": sampling.model_copy(update=filled)}
        if isinstance(self.region, OnlyMasked) and self.region.size is None:
            changes["region"] = self.region.model_copy(update={"size": defaults.size})
        return self.model_copy(update=changes)

    def features(self) -> frozenset[str]:
        """What a worker must be able to do to render this; of a resolved spec, its sampler too."""
        return features(self)


def _with_mask_images(mask: Mask, moved: Callable[[str], str]) -> Mask:
    if isinstance(mask, ImageMask):
        return mask.model_copy(update={"image": moved(mask.image)})
    if isinstance(mask, CombinedMask):
        return mask.model_copy(update={"masks": tuple(_with_mask_images(part, moved) for part in mask.masks)})
    return mask


def parse_job(data: str | bytes | Mapping[str, Any], *, where: str = "job") -> JobSpec:
    """The spec that a text, its bytes, or an already decoded object holds.

    `where` names it in messages, e.g. the file. Raises SpecError with every problem found, and nothing else:
    text over 256 KiB, JSON that is broken or has a key twice, NaN, unknown keys, values of the wrong type or
    out of range, and broken rules between fields.
    """
    text = decode(data, where)
    try:
        return JobSpec.model_validate_json(text)
    except ValidationError as error:
        raise explain(error, JobSpec, where) from None


class _SchemaWriter(GenerateJsonSchema):
    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        # A combined mask holds masks, itself included: there pydantic leaves the optional discriminator out.
        if kind != "skipped-discriminator":
            super().emit_warning(kind, detail)


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a job spec."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **JobSpec.model_json_schema(by_alias=True, schema_generator=_SchemaWriter),
        "title": "Overpaint job spec, version 1",
    }


__all__ = [
    "DEFAULT_DENOISE",
    "FEATURES",
    "LARGEST_SEED",
    "LARGEST_SPEC_BYTES",
    "NAME_PATTERN",
    "SAMPLERS",
    "SCHEDULERS",
    "SPEC_VERSION",
    "AlphaMask",
    "Blur",
    "ClipsegMask",
    "CombinedMask",
    "Compat",
    "Control",
    "ControlnetInpaint",
    "Crop",
    "Feather",
    "FeatherBorders",
    "Filter",
    "FinishOp",
    "FullRegion",
    "Grow",
    "ImageMask",
    "Img2Img",
    "InpaintModel",
    "Invert",
    "JobSpec",
    "LatentNoiseMask",
    "LoraUse",
    "Mask",
    "MaskOp",
    "Method",
    "ModelDefaults",
    "OnlyMasked",
    "Output",
    "Pad",
    "PadMask",
    "PrepareOp",
    "Preserve",
    "ReferenceKind",
    "Region",
    "Sampling",
    "Scale",
    "ScaleBy",
    "Source",
    "Threshold",
    "VaeEncodeInpaint",
    "is_name",
    "nearest",
    "parse_job",
    "reference_kind",
    "schema",
]
