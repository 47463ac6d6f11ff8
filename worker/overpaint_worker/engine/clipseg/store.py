"""The segmenters of an engine: each loaded when first asked for, and kept."""

from __future__ import annotations

from collections.abc import Collection

import structlog
import torch

from overpaint_shared.errors import OverpaintError
from overpaint_shared.offers import ModelTraits
from overpaint_worker.engine.clipseg.model import Segmenter, inspect, load
from overpaint_worker.engine.families.weights import HashCache
from overpaint_worker.registry import Registry

log = structlog.get_logger(__name__)


class SegmenterStore:
    """Segmenters by registry name. `get` is for the device's thread only, `traits` for any.

    Args:
        registry: the names.
        device: where they live.
        hashes: known digests.

    """

    def __init__(self, registry: Registry, device: torch.device, hashes: HashCache | None = None) -> None:
        self._registry, self._device = registry, device
        self._hashes = hashes or HashCache()
        self._loaded: dict[str, Segmenter] = {}
        self._traits: dict[str, ModelTraits] = {}

    def catalogue(self) -> list[ModelTraits]:
        """All that can be read; for each other one a line in the log says why not."""
        found: list[ModelTraits] = []
        for name in self._registry.segmenters:
            try:
                found.append(self.traits(name))
            except OverpaintError as error:
                log.warning(
                    "entry cannot be offered", action="model_refused", entry=f"segmenters.{name}",
                    error=str(error),
                )  # fmt: skip
        return found

    def traits(self, name: str) -> ModelTraits:
        """What the segmenter is; its weights are not loaded for that. Raises as `get`."""
        if name not in self._traits:
            self._traits[name] = inspect(self._registry.segmenter(name, "mask.segmenter"), self._hashes)
        return self._traits[name]

    def has(self, name: str) -> bool:
        """Whether it is loaded."""
        return name in self._loaded

    def relieve(self, in_use: Collection[tuple[str, str]]) -> bool:
        """Give up those that are loaded and not in use; whether there was one."""
        idle = [name for name in self._loaded if ("segmenters", name) not in in_use]
        for name in idle:
            log.info("segmenter given up", action="segmenter_unloaded", model=name)
            del self._loaded[name]
        return bool(idle)

    def get(self, name: str, field: str = "mask") -> Segmenter:
        """The segmenter, loaded if it is not; `field` is the mask's place in the job.

        Raises `UnsupportedError`: the registry has none of that name. `ModelLoadError`: it cannot be read.
        """
        if name not in self._loaded:
            entry = self._registry.segmenter(name, f"{field}.segmenter")
            self._loaded[name] = load(entry, self._device, self._hashes)
            self._traits[name] = self._loaded[name].traits
            log.info("segmenter loaded", action="segmenter_loaded", model=name)
        return self._loaded[name]
