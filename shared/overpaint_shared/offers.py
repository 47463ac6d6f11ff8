"""What live workers offer: their features, and the traits of what stands in their registries."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from pydantic import Field, ValidationError

from overpaint_shared.spec.fields import Name, Part
from overpaint_shared.spec.sampling import ModelDefaults

Kind = Literal["model", "controlnet", "lora", "segmenter", "vae"]


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
        """The offer of a worker, less entries that this version cannot read and models it does not serve."""
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
