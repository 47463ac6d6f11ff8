"""Whether a spec can be rendered: the operator's limits, and what the live workers offer together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from overpaint_shared.errors import Problem, SpecError, visible
from overpaint_shared.job import JobSpec
from overpaint_shared.offers import Announcement, Catalogue, Kind, ModelTraits, Offer
from overpaint_shared.settings import Limits
from overpaint_shared.spec.fields import nearest
from overpaint_shared.spec.masks import ClipsegMask, leaves
from overpaint_shared.spec.methods import ControlnetInpaint, InpaintModel
from overpaint_shared.spec.pictures import Scale
from overpaint_shared.spec.sampling import ModelDefaults

__all__ = [
    "Announcement",
    "Catalogue",
    "Kind",
    "ModelDefaults",
    "ModelTraits",
    "Offer",
    "SpecWarning",
    "check",
    "difference",
]

INPAINT_CHANNELS = 9
_PEOPLE_SAY = {"controlnet": "ControlNet", "lora": "LoRA", "vae": "VAE"}


@dataclass(frozen=True, kw_only=True)
class SpecWarning:
    """Something about a spec that does not stop it, but that its author wants to know."""

    path: str
    message: str
    fix: str | None = None

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return visible(f"{where}{self.message}" + (f" ({self.fix})" if self.fix else ""))


def check(
    spec: JobSpec, catalogue: Catalogue, limits: Limits, *, where: str = "job"
) -> tuple[SpecWarning, ...]:
    """Hold a spec against the operator's limits and against what the live workers offer.

    Returns warnings. Raises SpecError for a limit that is exceeded, a name that no worker has, a name that
    stands for two weights, entries that do not go together, and a feature that no live worker has. With no
    live worker nothing of theirs is refused: the job waits, and a warning says so.
    """
    problems = list(_over_limits(spec, catalogue, limits))
    warnings: tuple[SpecWarning, ...] = ()
    if catalogue.offers:
        named = list(_names(spec))
        problems += [problem for use in named for problem in _unknown(use, catalogue)]
        if not problems:
            problems += _mismatches(spec, named, catalogue)
        if not problems:
            problems += _unable(spec, named, catalogue)
        warnings = tuple(_differing_defaults(spec, catalogue))
    else:
        warnings = (
            SpecWarning(
                path="model",
                message="no worker is alive, so names and features are not checked and the job will wait",
                fix="start one: overpaint-worker",
            ),
        )
    if problems:
        raise SpecError(f"{where} cannot be rendered:", problems)
    return warnings


@dataclass(frozen=True)
class _Use:
    """A name that a spec uses."""

    path: str
    kind: Kind
    name: str

    @property
    def said(self) -> str:
        return f"{_PEOPLE_SAY.get(self.kind, self.kind)} {self.name!r}"


def _names(spec: JobSpec) -> Iterator[_Use]:
    yield _Use("model", "model", spec.model)
    if spec.vae is not None:
        yield _Use("vae", "vae", spec.vae)
    for i, lora in enumerate(spec.loras):
        yield _Use(f"loras[{i}].name", "lora", lora.name)
    if isinstance(spec.method, ControlnetInpaint):
        yield _Use("method.controlnet", "controlnet", spec.method.controlnet)
    for i, control in enumerate(spec.controls):
        yield _Use(f"controls[{i}].controlnet", "controlnet", control.controlnet)
    for path, mask in leaves(spec.mask) if spec.mask else ():
        if isinstance(mask, ClipsegMask):
            yield _Use(f"{path}.segmenter", "segmenter", mask.segmenter)


def _over_limits(spec: JobSpec, catalogue: Catalogue, limits: Limits) -> Iterator[Problem]:
    steps, defaults = spec.sampling.steps, catalogue.defaults(spec.model)
    if steps is None and defaults:
        steps = defaults.steps
    if steps is not None and steps > limits.max_steps:
        yield Problem(
            path="sampling.steps",
            message=f"{steps} is more than the operator allows",
            given=str(steps),
            allowed=f"1 to {limits.max_steps}",
        )
    for part, ops in (("prepare", spec.prepare), ("finish", spec.finish)):
        for i, op in enumerate(ops):
            if isinstance(op, Scale) and op.width * op.height > limits.max_output_pixels:
                yield Problem(
                    path=f"{part}[{i}]",
                    message=f"{op.width} x {op.height} is a larger picture than the operator allows",
                    given=f"{op.width} x {op.height} = {op.width * op.height} pixels",
                    allowed=f"at most {limits.max_output_pixels} pixels",
                )


def _unknown(use: _Use, catalogue: Catalogue) -> Iterator[Problem]:
    """The name is on no live worker, or stands for different weights on two."""
    found = catalogue.find(use.kind, use.name)
    if not found:
        known = catalogue.names(use.kind)
        yield Problem(
            path=use.path,
            message=f"no live worker has the {use.said}",
            given=f'"{use.name}"',
            allowed=", ".join(known) or f"none: no live worker has any {_PEOPLE_SAY.get(use.kind, use.kind)}",
            suggestion=nearest(use.name, known),
        )
    holders: dict[str, str] = {}
    for worker, traits in found:
        if traits.sha256:
            holders.setdefault(traits.sha256, worker)
    if len(holders) > 1:
        who = ", ".join(f"{digest[:12]} on {worker}" for digest, worker in sorted(holders.items()))
        yield Problem(
            path=use.path,
            message=f"the {use.said} is not the same weights on all workers ({who})",
            given=f'"{use.name}"',
            allowed="a name that has one hash; an operator gives the others names of their own",
        )


def _mismatches(spec: JobSpec, named: Sequence[_Use], catalogue: Catalogue) -> Iterator[Problem]:
    """Entries that were made for another architecture than the model's."""
    model = catalogue.find("model", spec.model)[0][1]
    for use in named[1:]:
        traits = catalogue.find(use.kind, use.name)[0][1]
        if use.kind == "segmenter" or (found := difference(traits, model)) is None:
            continue
        fitting = [
            name
            for name in catalogue.names(use.kind)
            if difference(catalogue.find(use.kind, name)[0][1], model) is None
        ]
        what, its, models = found
        yield Problem(
            path=use.path,
            message=f"the {use.said} has the {what} {its}, and the model {spec.model!r} has {models}",
            given=f'"{use.name}"',
            allowed=", ".join(fitting) or "none of those that the live workers have",
        )
    if isinstance(spec.method, InpaintModel):
        yield from _wrong_channels(spec, model, catalogue)


def difference(traits: ModelTraits, model: ModelTraits) -> tuple[str, object, object] | None:
    """The first trait in which an entry does not go with a model: what, the entry's, the model's; or None."""
    for what, its, models in (
        ("family", traits.family, model.family),
        ("text feature width", traits.context_width, model.context_width),
    ):
        if its is not None and models is not None and its != models:
            return what, its, models
    return None


def _wrong_channels(spec: JobSpec, model: ModelTraits, catalogue: Catalogue) -> Iterator[Problem]:
    if model.channels in {None, INPAINT_CHANNELS}:
        return
    models = [traits for traits in catalogue.entries() if traits.kind == "model"]
    fitting = ", ".join(traits.name for traits in models if traits.channels == INPAINT_CHANNELS)
    yield Problem(
        path="method.kind",
        message=f"needs a model with {INPAINT_CHANNELS} input channels; {spec.model!r} has {model.channels}",
        given='"inpaint_model"',
        allowed="another method" + (f", or one of the models {fitting}" if fitting else ""),
    )


def _unable(spec: JobSpec, named: Sequence[_Use], catalogue: Catalogue) -> Iterator[Problem]:
    """No one worker has all the names, or none of those that have has all the features."""
    able = [
        offer for offer in catalogue.offers if all((use.kind, use.name) in offer.entries for use in named)
    ]
    if not able:
        yield Problem(
            path="model",
            message="no live worker has all of: " + ", ".join(dict.fromkeys(use.said for use in named)),
            given=f'"{spec.model}"',
            allowed="entries that one worker has together",
        )
        return
    features = spec.features()
    wanted = [(offer, (features | _left_to(offer, spec)) - offer.features) for offer in able]
    closest, missing = min(wanted, key=lambda pair: len(pair[1]))
    known = frozenset[str]().union(*(offer.features for offer in able))
    for feature in sorted(missing):
        yield _missing(feature, known, closest)


def _left_to(offer: Offer, spec: JobSpec) -> set[str]:
    """The features that follow from the worker's own defaults (called for every job: no copies)."""
    defaults = offer.entries["model", spec.model].defaults
    if defaults is None:
        return set()
    named = {"sampler": defaults.sampler, "scheduler": defaults.scheduler}
    return {f"{kind}:{name}" for kind, name in named.items() if getattr(spec.sampling, kind) is None}


_FEATURE_PATHS = {
    "method": "method.kind",
    "mask": "mask.from",
    "sampler": "sampling.sampler",
    "scheduler": "sampling.scheduler",
    "region": "region.kind",
    "lora": "loras",
    "guidance": "sampling.guidance",
    "differential": "sampling.differential",
    "prompt": "prompt",
}


def _missing(feature: str, known: frozenset[str], closest: Offer) -> Problem:
    group, _, name = feature.partition(":")
    others = sorted(other.partition(":")[2] for other in known if other.startswith(f"{group}:"))
    return Problem(
        path=_FEATURE_PATHS.get(group, group),
        message=f"no live worker with these models can render {feature!r} (closest: {closest.worker})",
        given=f'"{name}"' if name else None,
        allowed=", ".join(others) or None,
        suggestion=nearest(name, others) if name else None,
    )


def _differing_defaults(spec: JobSpec, catalogue: Catalogue) -> Iterator[SpecWarning]:
    left_out = [
        name for name in ("steps", "cfg", "sampler", "scheduler") if getattr(spec.sampling, name) is None
    ]
    told = {
        tuple(getattr(traits.defaults, name, None) for name in left_out)
        for _, traits in catalogue.find("model", spec.model)
    }
    if len(told) > 1:
        yield SpecWarning(
            path="sampling",
            message=f"workers have different defaults for the model {spec.model!r}",
            fix=f"write {', '.join(left_out)}",
        )
