"""What the live workers offer together, and whether a spec can be rendered by one of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from pydantic import Field, ValidationError

from overpaint_shared.errors import Problem, SpecError
from overpaint_shared.job import JobSpec
from overpaint_shared.settings import Limits
from overpaint_shared.spec.fields import Name, Part, nearest
from overpaint_shared.spec.masks import ClipsegMask, leaves
from overpaint_shared.spec.methods import ControlnetInpaint, InpaintModel
from overpaint_shared.spec.pictures import Scale
from overpaint_shared.spec.sampling import ModelDefaults

Kind = Literal["model", "controlnet", "lora", "segmenter", "vae"]

INPAINT_CHANNELS = 9
_PEOPLE_SAY = {"controlnet": "ControlNet", "lora": "LoRA", "vae": "VAE"}


class ModelTraits(Part):
    """What a worker tells of one entry of its registry, read from the headers of the weights."""

    name: Name = Field(description="Name in the registry.")
    kind: Kind = Field(description="What the entry is.")
    family: str | None = Field(
        None, description="sd, sdxl, ...; null where it does not matter or is not known."
    )
    sha256: str | None = Field(None, description="Digest of the weights; null while it is not known.")
    channels: int | None = Field(
        None, description="Input channels of a model's denoiser: 4, or 9 for inpainting."
    )
    prediction: str | None = Field(None, description="epsilon, v or flow; of models only.")
    context_width: int | None = Field(
        None,
        description="Width of the text features that weights were made for: 768 (SD 1), 1024 (SD 2), ...",
    )
    defaults: ModelDefaults | None = Field(None, description="What a spec that leaves it out gets.")

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelTraits":
        """The traits that `to_json` wrote; what only a newer version knows is left out.

        Raises ValueError for what no version wrote.
        """
        known = {key: value for key, value in data.items() if key in cls.model_fields}
        known["defaults"] = _defaults(known.get("defaults"))
        return cls.model_validate(known)


def _defaults(data: Any) -> ModelDefaults | None:
    """The defaults, or None if a newer worker's name a sampler that this version does not know."""
    if not isinstance(data, Mapping):
        return None
    try:
        return ModelDefaults(
            **{key: value for key, value in data.items() if key in ModelDefaults.model_fields}
        )
    except ValidationError:
        return None


class Announcement(Protocol):
    """What a catalogue is made of; `ledger.WorkerRecord` is one."""

    @property
    def name(self) -> str:
        """The worker's name, for people."""
        ...

    @property
    def features(self) -> frozenset[str]:
        """What it can do; see `spec.features`."""
        ...

    @property
    def catalogue(self) -> Sequence[Mapping[str, Any]]:
        """`ModelTraits` as JSON."""
        ...

    @property
    def models(self) -> Sequence[str]:
        """The models whose queues it reads; empty: all in its catalogue."""
        ...


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What one live worker can do."""

    worker: str
    features: frozenset[str]
    entries: Mapping[tuple[Kind, str], ModelTraits]

    @classmethod
    def of(cls, worker: Announcement) -> "Offer":
        """The offer of a worker; entries that this version cannot read, and models it does not serve, are left out."""
        entries = {}
        for data in worker.catalogue:
            try:
                traits = ModelTraits.from_json(data)
            except ValueError:
                continue
            if traits.kind != "model" or not worker.models or traits.name in worker.models:
                entries[traits.kind, traits.name] = traits
        return cls(worker=worker.name, features=frozenset(worker.features), entries=entries)


@dataclass(frozen=True)
class Catalogue:
    """What the live workers offer together."""

    offers: tuple[Offer, ...] = ()

    @classmethod
    def merge(cls, workers: Iterable[Announcement]) -> "Catalogue":
        """The catalogue of these workers."""
        return cls(tuple(Offer.of(worker) for worker in workers))

    def names(self, kind: Kind) -> list[str]:
        """All names of that kind, sorted."""
        return sorted({name for offer in self.offers for (its, name) in offer.entries if its == kind})

    def find(self, kind: Kind, name: str) -> list[tuple[str, ModelTraits]]:
        """Every worker that has the entry, with what it says of it."""
        found = ((offer.worker, offer.entries.get((kind, name))) for offer in self.offers)
        return [(worker, traits) for worker, traits in found if traits is not None]

    def entries(self) -> list[ModelTraits]:
        """Every entry once, by kind and name; of workers that disagree, the first one's."""
        unique: dict[tuple[Kind, str], ModelTraits] = {}
        for offer in self.offers:
            unique = {**offer.entries, **unique}
        return sorted(unique.values(), key=lambda traits: (get_args(Kind).index(traits.kind), traits.name))

    def defaults(self, model: str) -> ModelDefaults | None:
        """What the model's entry gives a spec that leaves it out; None if no live worker tells."""
        told = (traits.defaults for _, traits in self.find("model", model))
        return next((defaults for defaults in told if defaults), None)


@dataclass(frozen=True, kw_only=True)
class SpecWarning:
    """Something about a spec that does not stop it, but that its author wants to know."""

    path: str
    message: str
    fix: str | None = None

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.message}" + (f" ({self.fix})" if self.fix else "")


def check(
    spec: JobSpec, catalogue: Catalogue, limits: Limits, *, where: str = "job"
) -> tuple[SpecWarning, ...]:
    """Hold a spec against the operator's limits and against what the live workers offer.

    Returns warnings. Raises SpecError for a limit that is exceeded, a name that no worker has, a name that stands for
    two weights, entries that do not go together, and a feature that no live worker has. With no live worker nothing
    of theirs is refused: the job waits, and a warning says so.
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
            message="is more than the operator allows",
            given=str(steps),
            allowed=f"1 to {limits.max_steps}",
        )
    for part, ops in (("prepare", spec.prepare), ("finish", spec.finish)):
        for i, op in enumerate(ops):
            if isinstance(op, Scale) and op.width * op.height > limits.max_output_pixels:
                yield Problem(
                    path=f"{part}[{i}]",
                    message="makes a picture larger than the operator allows",
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
    model = catalogue.find("model", spec.model)[0][1]
    for use in named[1:]:
        traits = catalogue.find(use.kind, use.name)[0][1]
        for what, its, models in (
            ("of the family", traits.family, model.family),
            ("made for text features of width", traits.context_width, model.context_width),
        ):
            if use.kind != "segmenter" and its and models and its != models:
                fitting = [
                    name for name in catalogue.names(use.kind) if _fits(model, use.kind, name, catalogue)
                ]
                yield Problem(
                    path=use.path,
                    message=f"the {use.said} is {what} {its}, and the model {spec.model!r} is {what} {models}",
                    given=f'"{use.name}"',
                    allowed=", ".join(fitting) or "none of those that the live workers have",
                )
                break
    if isinstance(spec.method, InpaintModel) and model.channels not in {None, INPAINT_CHANNELS}:
        fitting = [
            name
            for name in catalogue.names("model")
            if any(traits.channels == INPAINT_CHANNELS for _, traits in catalogue.find("model", name))
        ]
        yield Problem(
            path="method.kind",
            message=f"needs a model with {INPAINT_CHANNELS} input channels, and {spec.model!r} has {model.channels}",
            given='"inpaint_model"',
            allowed=f"another method, or one of the models {', '.join(fitting)}"
            if fitting
            else "another method",
        )


def _fits(model: ModelTraits, kind: Kind, name: str, catalogue: Catalogue) -> bool:
    traits = catalogue.find(kind, name)[0][1]
    return all(
        its is None or models is None or its == models
        for its, models in ((traits.family, model.family), (traits.context_width, model.context_width))
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
    wanted = [(offer, _needs(spec, offer) - offer.features) for offer in able]
    closest, missing = min(wanted, key=lambda pair: len(pair[1]))
    known = frozenset[str]().union(*(offer.features for offer in able))
    for feature in sorted(missing):
        yield _missing(feature, known, closest)


def _needs(spec: JobSpec, offer: Offer) -> frozenset[str]:
    defaults = offer.entries["model", spec.model].defaults
    return (spec.resolved(defaults) if defaults else spec).features()


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
        message=f"no live worker that has these models can render {feature!r} (the nearest is {closest.worker})",
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
