"""Rules between the fields of a spec that its types cannot say."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from overpaint_shared.errors import Problem
from overpaint_shared.spec.masks import MOST_MASK_OPS, MOST_MASKS, PadMask, leaves, nodes
from overpaint_shared.spec.methods import Img2Img
from overpaint_shared.spec.output import OnlyMasked
from overpaint_shared.spec.pictures import Pad

if TYPE_CHECKING:
    from overpaint_shared.job import JobSpec

Rule = Callable[["JobSpec"], Iterator[Problem]]


def problems(spec: "JobSpec") -> list[Problem]:
    """Every broken rule."""
    return [problem for rule in RULES for problem in rule(spec)]


def _method_needs_mask(spec: "JobSpec") -> Iterator[Problem]:
    if spec.mask is None and not isinstance(spec.method, Img2Img):
        yield Problem(
            path="method.kind",
            message="needs a `mask`, and there is none",
            given=f'"{spec.method.kind}"',
            allowed="img2img, or any method with a `mask`",
        )


def _masks_are_few(spec: "JobSpec") -> Iterator[Problem]:
    if spec.mask is None:
        return
    every = nodes(spec.mask)
    for what, most, count in (
        ("masks", MOST_MASKS, len(every)),
        ("operations on masks", MOST_MASK_OPS, sum(len(mask.ops) for mask in every)),
    ):
        if count > most:
            yield Problem(
                path="mask",
                given=str(count),
                message=f"has {count} {what}",
                allowed=f"at most {most} in a job",
            )


def _pad_mask_needs_pad(spec: "JobSpec") -> Iterator[Problem]:
    if spec.mask is None or any(isinstance(op, Pad) and op.adds for op in spec.prepare):
        return
    for path, mask in leaves(spec.mask):
        if isinstance(mask, PadMask):
            yield Problem(
                path=f"{path}.from",
                message="is what `pad` added, and no operation of `prepare` adds anything",
                given='"pad"',
                allowed="another source, or a `pad` in `prepare` with a side greater than 0",
            )


def _region_needs_mask_and_composite(spec: "JobSpec") -> Iterator[Problem]:
    if not isinstance(spec.region, OnlyMasked):
        return
    if spec.mask is None:
        yield _wants(
            "region.kind", '"only_masked"', "needs a `mask`, and there is none", "full, or give a `mask`"
        )
    if not spec.composite:
        yield _wants(
            "region.kind",
            '"only_masked"',
            "stitches the original back, and `composite` is false",
            "full, or `composite`: true",
        )


def _preserve_can_be_kept(spec: "JobSpec") -> Iterator[Problem]:
    if spec.preserve is None:
        return
    if spec.mask is None:
        yield _wants(
            "preserve", None, "says what a mask spares, and there is no `mask`", "no `preserve`, or a `mask`"
        )
    if spec.output.lossy:
        yield _wants(
            "preserve",
            None,
            f"cannot be kept by a lossy {spec.output.format}",
            "no `preserve`, or an output that is lossless (png, or webp with `lossless`: true)",
        )


def _differential_needs_noise_mask(spec: "JobSpec") -> Iterator[Problem]:
    if not spec.sampling.differential:
        return
    if spec.mask is None or isinstance(spec.method, Img2Img):
        yield _wants(
            "sampling.differential",
            "true",
            "needs a mask on the noise, which " + ("img2img has not" if spec.mask else "takes a `mask`"),
            "false, or a `mask` with a method other than img2img",
        )


def _wants(path: str, given: str | None, message: str, allowed: str) -> Problem:
    return Problem(path=path, given=given, message=message, allowed=allowed)


RULES: tuple[Rule, ...] = (
    _method_needs_mask,
    _masks_are_few,
    _pad_mask_needs_pad,
    _region_needs_mask_and_composite,
    _preserve_can_be_kept,
    _differential_needs_noise_mask,
)
