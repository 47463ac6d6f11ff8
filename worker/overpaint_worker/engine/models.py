"""The loaded models of an engine: read once, kept on the device, given up for others when unused."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
import torch

from overpaint_shared.errors import OverpaintError
from overpaint_worker.engine.families import FAMILIES, Family, Model, family
from overpaint_worker.engine.families.weights import HashCache

if TYPE_CHECKING:
    from overpaint_shared.catalogue import ModelTraits
    from overpaint_worker.registry import ModelEntry, Registry

log = structlog.get_logger(__name__)

KEPT_MODELS: Final = 2
"""Loaded models that are kept. More are loaded only while jobs use them all."""


class ModelStore:
    """Models by registry name. `load` is for the device's thread only.

    Args:
        registry: the names.
        device: where models live.
        kept: how many stay loaded.
        hashes: file of known digests, so that a checkpoint is hashed once per machine.

    """

    def __init__(
        self, registry: Registry, device: torch.device, kept: int = KEPT_MODELS, hashes: Path | None = None
    ) -> None:
        self.registry = registry
        self.device = device
        self._kept = kept
        self._loaded: OrderedDict[str, Model] = OrderedDict()
        self._traits: dict[str, ModelTraits] = {}
        cache = HashCache(hashes)
        self._families: dict[str, Family] = {name: family(name, cache) for name in FAMILIES}

    @property
    def loaded(self) -> list[str]:
        """Names of loaded models, used longest ago first."""
        return list(self._loaded)

    def traits(self, name: str) -> ModelTraits:
        """What the model is, from its headers. Raises `UnsupportedError` (no such name), `ModelLoadError`."""
        if name not in self._traits:
            entry = self.registry.model(name)
            self._traits[name] = self._family(entry).inspect(entry)
        return self._traits[name]

    def catalogue(self) -> list[ModelTraits]:
        """All models that can be read; for each other one a line in the log says why not."""
        found: list[ModelTraits] = []
        for name in self.registry.models:
            try:
                found.append(self.traits(name))
            except OverpaintError as error:
                log.warning("model cannot be offered", action="model_refused", model=name, error=str(error))
        return found

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

    def _make_room(self, in_use: Collection[str]) -> None:
        idle = [name for name in self._loaded if name not in in_use]
        for name in idle[: max(len(self._loaded) + 1 - self._kept, 0)]:
            log.info("model given up", action="model_unloaded", model=name)
            del self._loaded[name]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _family(self, entry: ModelEntry) -> Family:
        return self._families[entry.family]
