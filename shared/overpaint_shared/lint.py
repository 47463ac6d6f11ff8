"""Known mistakes in a spec that is right as such: what will happen, and what to write instead.

A rule sees what the spec tells, what the model's registry entry fills in, and the source's size where it is
known. What only the pictures tell (coverage, softness) is the worker's to judge.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from overpaint_shared.catalogue import SpecWarning
from overpaint_shared.job import (
    Blur,
    ClipsegMask,
    ControlnetInpaint,
    Feather,
    FeatherBorders,
    Img2Img,
    JobSpec,
    LatentNoiseMask,
    Mask,
    ModelDefaults,
    OnlyMasked,
    Pad,
    PadMask,
    Threshold,
    VaeEncodeInpaint,
)
from overpaint_shared.sizes import Size, cropped, is_whole, padded, size_after
from overpaint_shared.spec.masks import CombinedMask

FULL: Final = 0.9999
"""Above this, `denoise` counts as 1."""
LARGE: Final = 1.5
"""Times the model's own side: from here on, SD 1.x at 768 for one, things are painted twice."""
SMALL: Final = 0.66
"""Times the model's own side: below, faces and hands fall apart."""
KEPT: Final = 0.5
"""Up to this `denoise` the source holds the composition together, whatever the size."""
SMALL_MASK: Final = 0.25
"""A mask that must cover more than this share is not small."""
LCM_STEPS: Final = 12
LCM_CFG: Final = 2.5
MANY_STEPS: Final = 100


@dataclass(frozen=True)
class Subject:
    """A spec, as far as it can be known before it runs; None: left to a model whose defaults nobody told."""

    spec: JobSpec
    defaults: ModelDefaults | None
    source: Size | None

    @property
    def steps(self) -> int | None:
        """As they will be."""
        return self.spec.sampling.steps or (self.defaults.steps if self.defaults else None)

    @property
    def cfg(self) -> float | None:
        """As it will be."""
        given = self.spec.sampling.cfg
        return given if given is not None else self.defaults.cfg if self.defaults else None

    @property
    def sampler(self) -> str | None:
        """As it will be."""
        return self.spec.sampling.sampler or (self.defaults.sampler if self.defaults else None)

    @property
    def compat(self) -> bool:
        """Whether the reference's own behaviour is asked for."""
        return self.spec.compat == "comfyui"

    @property
    def canvas(self) -> Size | None:
        """The prepared picture's size."""
        return size_after(self.source, self.spec.prepare, compat=self.compat)

    @property
    def greys(self) -> bool:
        """Whether the picture is greyed under the mask before it is encoded."""
        method = self.spec.method
        return isinstance(method, VaeEncodeInpaint) or (
            isinstance(method, ControlnetInpaint) and method.latent == "vae_encode_inpaint"
        )

    @property
    def noise_masked(self) -> bool:
        """Whether the picture is encoded whole and noise acts under the mask."""
        method = self.spec.method
        return isinstance(method, LatentNoiseMask) or (
            isinstance(method, ControlnetInpaint) and method.latent == "latent_noise_mask"
        )


Rule = Callable[[Subject], Iterator[SpecWarning]]


def lint(
    spec: JobSpec, *, defaults: ModelDefaults | None = None, source_size: Size | None = None
) -> tuple[SpecWarning, ...]:
    """The known mistakes in a spec, in the order of the rules.

    `defaults`: of the model's registry entry, for what the spec leaves out; None if nobody tells.
    `source_size`: (width, height) of the source, upright, in pixels; None if it is not known.
    """
    subject = Subject(spec, defaults, source_size)
    return tuple(warning for rule in RULES for warning in rule(subject))


# ---------------------------------------------------------------------------------------- denoise and method


def _grey_shows(subject: Subject) -> Iterator[SpecWarning]:
    if subject.greys and subject.spec.denoise <= FULL:
        is_control = isinstance(subject.spec.method, ControlnetInpaint)
        other = '"latent": "latent_noise_mask"' if is_control else "the method latent_noise_mask"
        yield SpecWarning(
            path="sampling.denoise",
            message=f"{subject.spec.denoise:g} leaves some of the grey that this method paints under the "
            "mask before it encodes the picture, and the result will be dull or grey there",
            fix=f"write 1, or take {other}, which keeps the picture",
        )


def _nothing_is_kept(subject: Subject) -> Iterator[SpecWarning]:
    if isinstance(subject.spec.method, Img2Img) and subject.spec.denoise > FULL:
        yield SpecWarning(
            path="sampling.denoise",
            message="1 paints the whole picture anew: next to nothing of the source is kept",
            fix="write 0.3 (small changes) to 0.8 (large ones)",
        )


def _mask_is_ignored_inside(subject: Subject) -> Iterator[SpecWarning]:
    mask = subject.spec.mask
    if (
        not subject.noise_masked
        or subject.spec.denoise <= FULL
        or mask is None
        or mask.min_coverage >= SMALL_MASK
    ):
        return
    yield SpecWarning(
        path="sampling.denoise",
        message="1 with latent_noise_mask keeps nothing of what is under the mask, and a small mask is "
        "then filled with what fits the prompt rather than the place",
        fix="write 0.5 to 0.9, or take a method that is made for 1: vae_encode_inpaint, inpaint_model",
    )


def _mask_without_effect(subject: Subject) -> Iterator[SpecWarning]:
    spec = subject.spec
    if isinstance(spec.method, Img2Img) and spec.mask is not None and not spec.composite:
        yield SpecWarning(
            path="mask",
            message="has no effect: img2img repaints the whole picture, and `composite` is false",
            fix="write `composite`: true, or another method",
        )


# ---------------------------------------------------------------------------------------- sizes


def _native_size(subject: Subject) -> Iterator[SpecWarning]:
    worked, path = _worked_size(subject)
    if worked is None or subject.defaults is None:
        return
    side, native = math.sqrt(worked[0] * worked[1]), subject.defaults.size
    what = f"{worked[0]} x {worked[1]} pixels for a model that was trained at {native}"
    if side > LARGE * native and subject.spec.denoise > KEPT:
        fix = f"scale it down in `prepare` to about {native} a side"
        if subject.spec.mask is not None and subject.spec.composite:
            fix += ', or work on the part around the mask: "region": {"kind": "only_masked"}'
        yield SpecWarning(path=path, message=f"{what}: so large, things tend to appear twice", fix=fix)
    if side < SMALL * native:
        fix = f"scale it up in `prepare` to about {native} a side, and back down in `finish`"
        if path == "region.size":
            fix = f"write {native}, or null for the model's own size"
        yield SpecWarning(path=path, message=f"{what}: so small, details fall apart", fix=fix)


def _worked_size(subject: Subject) -> tuple[Size | None, str]:
    """What the model sees, as far as it is known, and the part of the spec that says so."""
    region = subject.spec.region
    if isinstance(region, OnlyMasked):
        return (None if region.size is None else (region.size, region.size)), "region.size"
    return subject.canvas, "prepare" if subject.spec.prepare else "source"


def _odd_sides(subject: Subject) -> Iterator[SpecWarning]:
    canvas = subject.canvas
    if canvas is None or is_whole(canvas) or isinstance(subject.spec.region, OnlyMasked):
        return
    width, height = canvas
    said = f"{width} x {height} pixels are no multiples of 8"
    if not subject.compat:
        model = padded(canvas)
        message = (
            f"{said}: the edges are repeated up to {model[0]} x {model[1]} for the model, and cut off the "
            f"result, which has {width} x {height}"
        )
    else:
        model = cropped(canvas)
        message = f"{said}: like the reference, the centre of {model[0]} x {model[1]} is all that is rendered"
        if subject.noise_masked:
            message += ", and the mask on the noise lies up to 3.5 pixels beside it"
    yield SpecWarning(
        path="prepare" if subject.spec.prepare else "source",
        message=message,
        fix="crop or scale to multiples of 8 in `prepare`"
        + (', or write `compat`: "none"' if subject.compat else ""),
    )


# ---------------------------------------------------------------------------------------- masks


def _each_mask(mask: Mask, path: str = "mask") -> Iterator[tuple[str, Mask]]:
    """The mask, and all that are combined in it."""
    yield path, mask
    if isinstance(mask, CombinedMask):
        for i, part in enumerate(mask.masks):
            yield from _each_mask(part, f"{path}.masks[{i}]")


def _masks(subject: Subject) -> Iterator[tuple[str, Mask]]:
    if subject.spec.mask is not None:
        yield from _each_mask(subject.spec.mask)


def _softness_undone(subject: Subject) -> Iterator[SpecWarning]:
    for path, mask in _masks(subject):
        softened: str | None = None
        for i, op in enumerate(mask.ops):
            if isinstance(op, Feather | FeatherBorders | Blur):
                softened = softened or f"ops[{i}] ({op.op})"
            elif isinstance(op, Threshold) and softened:
                yield SpecWarning(
                    path=f"{path}.ops[{i}]",
                    message=f"makes hard again what {softened} has softened",
                    fix="put `threshold` before what softens",
                )
                softened = None


def _softness_lost(subject: Subject) -> Iterator[SpecWarning]:
    """A mask that is soft by nature, made hard, then softened by a fixed width."""
    for path, mask in _masks(subject):
        if not _is_soft(subject.spec, mask):
            continue
        hard = next((i for i, op in enumerate(mask.ops) if isinstance(op, Threshold)), None)
        if hard is None or not any(isinstance(op, Feather | Blur) for op in mask.ops[hard + 1 :]):
            continue
        yield SpecWarning(
            path=f"{path}.ops[{hard}]",
            message=f'makes the mask "from": "{mask.from_}" hard, whose own softness is lost: only the '
            "width of what follows is left",
            fix="leave `threshold` out to keep the mask's own edge",
        )


def _is_soft(spec: JobSpec, mask: Mask) -> bool:
    if isinstance(mask, PadMask):
        return any(isinstance(op, Pad) and op.adds and op.feathering for op in spec.prepare)
    return isinstance(mask, ClipsegMask) and mask.blur > 0


def _softness_rounded(subject: Subject) -> Iterator[SpecWarning]:
    if not subject.greys or subject.spec.composite:
        return
    for path, mask in _masks(subject):
        soft = [i for i, op in enumerate(mask.ops) if isinstance(op, Feather | FeatherBorders | Blur)]
        if soft and not any(isinstance(op, Threshold) for op in mask.ops[soft[-1] :]):
            yield SpecWarning(
                path=f"{path}.ops[{soft[-1]}]",
                message="makes a soft edge, and this method rounds its mask to 0 or 1; only `composite` "
                "would show it",
                fix="write `composite`: true, or take latent_noise_mask, whose mask stays soft",
            )


def _hard_differential(subject: Subject) -> Iterator[SpecWarning]:
    mask = subject.spec.mask
    if subject.spec.sampling.differential and mask and mask.ops and isinstance(mask.ops[-1], Threshold):
        yield SpecWarning(
            path="sampling.differential",
            message="needs a soft mask, which says from which step on each place is repainted, and "
            "`threshold` makes this one hard",
            fix="leave `threshold` out, or soften the mask after it",
        )


def _borders_off_by_one(subject: Subject) -> Iterator[SpecWarning]:
    if not subject.compat:
        return
    for path, mask in _masks(subject):
        for i, op in enumerate(mask.ops):
            if isinstance(op, FeatherBorders) and (op.right or op.bottom):
                sides = " and ".join(side for side in ("right", "bottom") if getattr(op, side))
                yield SpecWarning(
                    path=f"{path}.ops[{i}]",
                    message=f"has, like the reference, an error of one pixel at the {sides}: the first "
                    "column or row is weakened in place of the last",
                    fix='write `compat`: "none" for the fade that is meant',
                )


# ---------------------------------------------------------------------------------------- what cannot be kept


def _cannot_preserve(subject: Subject) -> Iterator[SpecWarning]:
    spec = subject.spec
    if spec.preserve is not None and not spec.composite:
        yield SpecWarning(
            path="preserve",
            message="will most likely fail the job: with `composite` false nothing puts the original back "
            "outside the mask, and encoding alone changes it by some levels",
            fix="write `composite`: true",
        )


# ---------------------------------------------------------------------------------------- sampling


def _negative_ignored(subject: Subject) -> Iterator[SpecWarning]:
    cfg = subject.cfg
    if subject.spec.negative_prompt and cfg is not None and math.isclose(cfg, 1.0):
        yield SpecWarning(
            path="negative_prompt",
            message="is ignored: at cfg 1 only the prompt is evaluated",
            fix="write a cfg above 1, which takes twice the time, or leave the negative prompt out",
        )


def _lcm(subject: Subject) -> Iterator[SpecWarning]:
    if subject.sampler != "lcm":
        return
    if subject.steps is not None and subject.steps > LCM_STEPS:
        yield SpecWarning(
            path="sampling.steps",
            message=f"{subject.steps} are many for the sampler lcm, which adds new noise in each and gets "
            f"no better",
            fix="write 4 to 8",
        )
    if subject.cfg is not None and subject.cfg > LCM_CFG:
        yield SpecWarning(
            path="sampling.cfg",
            message=f"{subject.cfg:g} is high for the sampler lcm and its models: colours burn out",
            fix="write 1 to 2",
        )


def _many_steps(subject: Subject) -> Iterator[SpecWarning]:
    if subject.sampler != "lcm" and subject.steps is not None and subject.steps > MANY_STEPS:
        yield SpecWarning(
            path="sampling.steps",
            message=f"{subject.steps} cost time and change little: samplers settle at 20 to 50",
            fix="write 50 or less",
        )


RULES: tuple[Rule, ...] = (
    _grey_shows,
    _nothing_is_kept,
    _mask_is_ignored_inside,
    _mask_without_effect,
    _native_size,
    _odd_sides,
    _softness_undone,
    _softness_lost,
    _softness_rounded,
    _hard_differential,
    _borders_off_by_one,
    _cannot_preserve,
    _negative_ignored,
    _lcm,
    _many_steps,
)
