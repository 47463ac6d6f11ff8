"""The registry: `models.toml`, the only way weights get a name. Reads no weights and imports no torch.

Each table is one kind of weights, each sub-table one name that job specs may use:

    [models.sd15]
    family = "sd"
    path = "/models/sd15"

`docs/models.md` describes every key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import Field, ValidationError

from overpaint_shared.errors import Problem, SettingsError, UnsupportedError, shorten
from overpaint_shared.explain import join
from overpaint_shared.explain import problems as explained
from overpaint_shared.spec.fields import Part, is_name, nearest
from overpaint_shared.spec.sampling import ModelDefaults

FamilyName = Literal["sd", "sdxl"]
"""Each the name of its module in `engine.families`."""
Prediction = Literal["epsilon", "v"]
DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
TextDtypeName = Literal["auto", "float32", "float16"]

SHIPPED: Final = Path(__file__).with_name("miniatures") / "models.toml"
"""The project's own miniature models, which are rendered where no registry is named."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MOST_NAMES: Final = 8
_INJECTED: Final = {"name", "base"}
_NAMES: Final = "a-z, 0-9 and . _ - after the first, at most 64 characters"
_FORMS: Final = {
    "revision": "the commit's 40 lower-case hexadecimal digits (a branch or tag would not pin anything)",
    "sha256": "64 lower-case hexadecimal digits",
}


class RegistryError(SettingsError):
    """`models.toml` is wrong. `problems` lists every fault."""

    code = "registry"


class Entry(Part):
    """One name and the weights that it stands for."""

    table: ClassVar[str]
    """The table of `models.toml` that holds such entries."""

    name: str
    base: Path
    """The folder of `models.toml`: relative paths start there."""
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    """A folder, a `.safetensors` file, or with `revision` a hub id."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Commit of a hub id. A branch or tag would not pin anything."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Digest that the weights must have, checked when they are loaded."""

    @property
    def local_path(self) -> Path:
        """`path` as a place on this machine; without meaning for hub ids."""
        return self.base / Path(self.path).expanduser()

    def field(self, key: str) -> str:
        """Where a key of this entry stands in the file: `models.sd15.path`."""
        return f"{self.table}.{self.name}.{key}"


class ModelEntry(Entry):
    """A checkpoint: denoiser, VAE and text encoder."""

    table: ClassVar[str] = "models"

    family: FamilyName
    config: Annotated[str, Field(min_length=1)] | None = None
    """For single files: a shipped configuration, or a folder of JSON. None: told by the weights' shapes."""
    unet: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """A diffusers UNet's folder, whose UNet takes the place of the checkpoint's own."""
    prediction: Prediction | None = None
    """What the denoiser predicts. None: as the model's own files say."""
    dtype: DtypeName = "auto"
    """What the denoiser computes in. auto: float32 on a CPU, float16 elsewhere."""
    text_encoder_dtype: TextDtypeName = "auto"
    """float16: the text encoder's weights are rounded to half, and still computed with in float32."""
    defaults: ModelDefaults = ModelDefaults()
    """For specs that leave these out."""

    @property
    def unet_path(self) -> Path | None:
        """`unet` as a place on this machine."""
        return None if self.unet is None else self.base / Path(self.unet).expanduser()


class ControlnetEntry(Entry):
    """A ControlNet."""

    table: ClassVar[str] = "controlnets"

    family: FamilyName = "sd"
    config: Annotated[str, Field(min_length=1)] | None = None
    dtype: DtypeName = "auto"


class VaeEntry(Entry):
    """A VAE that a job may use instead of its model's own."""

    table: ClassVar[str] = "vaes"

    family: FamilyName = "sd"
    config: Annotated[str, Field(min_length=1)] | None = None
    dtype: DtypeName = "auto"


class LoraEntry(Entry):
    """A LoRA."""

    table: ClassVar[str] = "loras"


class SegmenterEntry(Entry):
    """A model that finds a mask from words."""

    table: ClassVar[str] = "segmenters"


_KINDS: Final[dict[str, type[Entry]]] = {
    kind.table: kind for kind in (ModelEntry, ControlnetEntry, VaeEntry, LoraEntry, SegmenterEntry)
}
E = TypeVar("E", bound=Entry)


@dataclass(frozen=True, slots=True)
class Registry:
    """All entries of one `models.toml`, by name."""

    path: Path
    models: Mapping[str, ModelEntry] = field(default_factory=dict)
    controlnets: Mapping[str, ControlnetEntry] = field(default_factory=dict)
    vaes: Mapping[str, VaeEntry] = field(default_factory=dict)
    loras: Mapping[str, LoraEntry] = field(default_factory=dict)
    segmenters: Mapping[str, SegmenterEntry] = field(default_factory=dict)

    @staticmethod
    def load(path: Path) -> Registry:
        """Read and check a `models.toml`.

        Raises `RegistryError`: it cannot be read, is no TOML, or an entry is wrong.
        """
        path = path.expanduser().absolute()
        tables = _read(path)
        problems: list[Problem] = []
        entries: dict[str, dict[str, Any]] = {name: {} for name in _KINDS}
        for entry in _parsed(tables, path.parent, problems):
            entries[entry.table][entry.name] = entry
        if problems:
            raise RegistryError(f"the registry {path} is wrong", problems)
        return Registry(path, **entries)

    def entries(self) -> Iterator[Entry]:
        """All entries, kind by kind."""
        for table in _KINDS:
            yield from getattr(self, table).values()

    def model(self, name: str) -> ModelEntry:
        """The model of that name. Raises `UnsupportedError` when this worker has none."""
        return _found(self.models, name, "model", "model")

    def controlnet(self, name: str, where: str = "controlnet") -> ControlnetEntry:
        """The ControlNet of that name; `where` is the spec's field. Raises `UnsupportedError`."""
        return _found(self.controlnets, name, "ControlNet", where)

    def segmenter(self, name: str, where: str = "mask.segmenter") -> SegmenterEntry:
        """The segmenter of that name; `where` is the spec's field. Raises `UnsupportedError`."""
        return _found(self.segmenters, name, "segmenter", where)

    def vae(self, name: str) -> VaeEntry:
        """The VAE of that name. Raises `UnsupportedError`."""
        return _found(self.vaes, name, "VAE", "vae")

    def lora(self, name: str, where: str = "loras") -> LoraEntry:
        """The LoRA of that name; `where` is the spec's field. Raises `UnsupportedError`."""
        return _found(self.loras, name, "LoRA", where)


def _found(entries: Mapping[str, E], name: str, kind: str, where: str) -> E:
    if name in entries:
        return entries[name]
    close = nearest(name, entries)
    fix = f"did you mean {close!r}?" if close else f"{_use(entries)}add it to the worker's models.toml"
    raise UnsupportedError(f"this worker has no {kind} {name!r}", field=where, value=name, fix=fix)


def _use(names: Iterable[str]) -> str:
    """The names that there are, as the first half of an advice; of many the first few."""
    known = list(names)
    some = ", ".join(known[:_MOST_NAMES]) + (", ..." if len(known) > _MOST_NAMES else "")
    return f"use {some}, or " if known else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise RegistryError(
            f"the registry {path} cannot be read: {cause.strerror}",
            field="registry", value=str(path), fix="name a models.toml with --registry or OVERPAINT_REGISTRY",
        ) from cause  # fmt: skip
    except ValueError as cause:  # TOML or UTF-8
        raise RegistryError(
            f"the registry {path} is no TOML: {cause}",
            field="registry",
            value=str(path),
            fix="mend that line",
        ) from cause


def _parsed(tables: Mapping[str, Any], base: Path, problems: list[Problem]) -> Iterator[Entry]:
    """The entries that are right; what is not goes to `problems`."""
    for table, named in tables.items():
        kind = _KINDS.get(table)
        if kind is None:
            problems.append(_unknown(table, table, _KINDS, "table"))
        elif not isinstance(named, dict):
            problems.append(_problem(table, "is no table of entries", named, f"[{table}.NAME]"))
        else:
            for name, keys in named.items():
                yield from _entry(kind, name, keys, base, problems)


def _entry(kind: type[Entry], name: str, keys: Any, base: Path, problems: list[Problem]) -> Iterator[Entry]:
    where = f"{kind.table}.{name}"
    if not is_name(name):
        problems.append(_problem(where, "is not a name that a job could use", name, _NAMES))
        return
    if not isinstance(keys, dict):
        problems.append(_problem(where, "is no table", keys, f"[{where}] with keys below it"))
        return
    wrong = list(_key_problems(kind, where, keys))
    try:
        entry = kind.model_validate({**_known_keys(kind, keys), "name": name, "base": base})
        wrong.extend(_place_problems(entry))
    except ValidationError as error:
        wrong.extend(_explained(kind, where, error))
    if wrong:
        problems.extend(wrong)
    else:
        yield entry


def _allowed_keys(kind: type[Entry]) -> list[str]:
    return sorted(kind.model_fields.keys() - _INJECTED)


def _known_keys(kind: type[Entry], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key in _allowed_keys(kind)}


def _key_problems(kind: type[Entry], where: str, keys: Mapping[str, Any]) -> Iterator[Problem]:
    allowed = _allowed_keys(kind)
    for key in keys:
        if key not in allowed:
            yield _unknown(f"{where}.{key}", key, allowed, "key")


def _place_problems(entry: Entry) -> Iterator[Problem]:
    """A hub id needs its revision and a path has none. Whether a path exists is told when it is loaded."""
    if entry.revision is None:
        if _HUB_ID.fullmatch(entry.path) and not entry.local_path.exists():
            message = "is no file or folder here, and a hub id only with its `revision`"
            yield _problem(
                entry.field("path"), message, entry.path, "revision = a commit's 40 hexadecimal digits"
            )
    elif not _HUB_ID.fullmatch(entry.path):
        yield _problem(entry.field("path"), "is no hub id, so it has no `revision`", entry.path, "owner/name")


def _explained(kind: type[Entry], where: str, error: ValidationError) -> Iterator[Problem]:
    for problem in explained(error, kind):
        yield replace(
            problem, path=join(where, problem.path), allowed=_FORMS.get(problem.path, problem.allowed)
        )


def _unknown(path: str, name: str, known: Iterable[str], what: str) -> Problem:
    known = list(known)
    return Problem(
        path=path, message=f"is no {what} of the registry", given=shorten(name), allowed=", ".join(known),
        suggestion=nearest(name, known),
    )  # fmt: skip


def _problem(path: str, message: str, given: object, allowed: str) -> Problem:
    return Problem(path=path, message=message, given=shorten(given), allowed=allowed)
