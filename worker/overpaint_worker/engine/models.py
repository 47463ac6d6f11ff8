"""The loaded models of an engine: read once, kept on the device, given up for others when unused."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import structlog
import torch

from overpaint_shared.errors import OverpaintError
from overpaint_worker.engine.families import FAMILIES, Coder, Family, Model, family
from overpaint_worker.engine.families.controlnet import ControlNet
from overpaint_worker.engine.families.lora import Lora, inspect_lora, read_lora
from overpaint_worker.engine.families.weights import HashCache, locate
from overpaint_worker.registry import (
    ControlnetEntry,
    Entry,
    LoraEntry,
    ModelEntry,
    SegmenterEntry,
    VaeEntry,
)

if TYPE_CHECKING:
    from overpaint_shared.catalogue import ModelTraits
    from overpaint_worker.registry import Registry

log = structlog.get_logger(__name__)

KEPT_MODELS: Final = 2
"""Loaded models that are kept. More are loaded only while jobs use them all."""
KEPT_CONTROLNETS: Final = 4
KEPT_VAES: Final = 2
KEPT_LORAS: Final = 8
"""What else is kept loaded; jobs under way keep theirs beyond that."""

T = TypeVar("T")

Named = tuple[str, str]
"""An entry of the registry: its table and its name."""


class Shelf(Generic[T]):
    """The things used last, at most `kept`, each made when it is first asked for."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._held: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The thing of that key; the one used longest ago makes room for a new one."""
        if key not in self._held:
            while len(self._held) >= self._kept:
                self._held.popitem(last=False)
            self._held[key] = make()
        self._held.move_to_end(key)
        return self._held[key]

    def keep_only(self, keys: Collection[Hashable]) -> bool:
        """Give up all others; whether there were any."""
        idle = [key for key in self._held if key not in keys]
        for key in idle:
            del self._held[key]
        return bool(idle)


class ModelStore:
    """Models by registry name. `load` is for the device's thread only.

    Args:
        registry: the names.
        device: where models live.
        kept: how many stay loaded.
        hashes: known digests, so that a checkpoint is hashed once per machine.

    """

    def __init__(
        self,
        registry: Registry,
        device: torch.device,
        kept: int = KEPT_MODELS,
        hashes: HashCache | None = None,
    ) -> None:
        self.registry = registry
        self.device = device
        self._kept = kept
        self._loaded: OrderedDict[str, Model] = OrderedDict()
        self._controlnets = Shelf[ControlNet](KEPT_CONTROLNETS)
        self._vaes = Shelf[Coder](KEPT_VAES)
        self._loras = Shelf[Lora](KEPT_LORAS)
        self._traits: dict[tuple[str, str], ModelTraits] = {}
        self._hashes = hashes or HashCache()
        self._families: dict[str, Family] = {name: family(name, self._hashes) for name in FAMILIES}

    @property
    def loaded(self) -> list[str]:
        """Names of loaded models, used longest ago first."""
        return list(self._loaded)

    def traits(self, name: str) -> ModelTraits:
        """What the model is, from its headers. Raises `UnsupportedError` (no such name), `ModelLoadError`."""
        return self.traits_of(self.registry.model(name))

    def traits_of(self, entry: Entry) -> ModelTraits:
        """What an entry of the registry is, from its headers. Raises `ModelLoadError`."""
        key = (entry.table, entry.name)
        if key not in self._traits:
            self._traits[key] = self._inspect(entry)
        return self._traits[key]

    def _inspect(self, entry: Entry) -> ModelTraits:
        if isinstance(entry, ControlnetEntry):
            return self._families[entry.family].inspect_controlnet(entry)
        if isinstance(entry, VaeEntry):
            return self._families[entry.family].inspect_vae(entry)
        if isinstance(entry, LoraEntry):
            return inspect_lora(entry, self._hashes)
        if isinstance(entry, ModelEntry):
            return self._family(entry).inspect(entry)
        raise TypeError(f"nothing is known of {entry.table}")

    def catalogue(self) -> list[ModelTraits]:
        """All entries that can be read; for each other one a line in the log says why not."""
        found: list[ModelTraits] = []
        for entry in self.registry.entries():
            if isinstance(entry, SegmenterEntry):
                continue
            try:
                found.append(self.traits_of(entry))
            except OverpaintError as error:
                log.warning(
                    "entry cannot be offered", action="model_refused", entry=f"{entry.table}.{entry.name}",
                    error=str(error),
                )  # fmt: skip
        return found

    def controlnet(self, name: str, field: str = "controlnet") -> ControlNet:
        """The ControlNet, loaded if it is not; `field` is where the spec names it.

        Raises `UnsupportedError`: this engine has none of that name. `ModelLoadError`: it cannot be read.
        """
        entry = self.registry.controlnet(name, field)
        family = self._families[entry.family]
        return self._controlnets.get(name, lambda: family.load_controlnet(entry, self.device))

    def vae(self, name: str) -> Coder:
        """A VAE by itself, loaded if it is not. Raises as `controlnet`."""
        entry = self.registry.vae(name)
        family = self._families[entry.family]
        return self._vaes.get(name, lambda: family.load_vae(entry, self.device))

    def lora(self, name: str, field: str = "loras") -> Lora:
        """A LoRA's changes, read if they are not. Raises as `controlnet`."""
        entry = self.registry.lora(name, field)
        return self._loras.get(name, lambda: read_lora(entry, self._hashes))

    def get(
        self,
        name: str,
        in_use: Collection[str] = (),
        on_load: Callable[[str, float | None], None] | None = None,
    ) -> Model:
        """The model, loaded if it is not.

        `in_use` are names that must stay. `on_load(name, seconds)` is called before a load, with None, and
        after it.

        Raises:
            UnsupportedError: this engine has no such model. ModelLoadError: it cannot be read.

        """
        if name not in self._loaded:
            entry = self.registry.model(name)
            self._make_room(in_use)
            tell = on_load or (lambda _name, _seconds: None)
            tell(name, None)
            began = time.perf_counter()
            self._loaded[name] = self._family(entry).load(entry, self.device)
            tell(name, time.perf_counter() - began)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def relieve(self, in_use: Collection[Named]) -> bool:
        """Give up all that is loaded and not in use; whether there was anything."""
        used: dict[str, set[str]] = {}
        for table, name in in_use:
            used.setdefault(table, set()).add(name)
        idle = [name for name in self._loaded if name not in used.get("models", ())]
        for name in idle:
            self._give_up(name)
        given_up = [
            self._controlnets.keep_only(used.get("controlnets", ())),
            self._vaes.keep_only(used.get("vaes", ())),
            self._loras.keep_only(used.get("loras", ())),
        ]
        return bool(idle) or any(given_up)

    def weight_bytes(self, in_use: Collection[Named]) -> int:
        """About how many bytes the weight files of these entries have."""
        entries = [entry for entry in self.registry.entries() if (entry.table, entry.name) in in_use]
        return sum(file.stat().st_size for entry in entries for file in _weight_files(entry))

    def _give_up(self, name: str) -> None:
        log.info("model given up", action="model_unloaded", model=name)
        del self._loaded[name]

    def _make_room(self, in_use: Collection[str]) -> None:
        idle = [name for name in self._loaded if name not in in_use]
        for name in idle[: max(len(self._loaded) + 1 - self._kept, 0)]:
            self._give_up(name)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _family(self, entry: ModelEntry) -> Family:
        return self._families[entry.family]


def _weight_files(entry: Entry) -> list[Path]:
    path = locate(entry)
    return [path] if path.is_file() else list(path.rglob("*.safetensors"))
