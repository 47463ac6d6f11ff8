"""A device with little memory, for tests on a CPU: weights are counted, and what does not fit is refused.

Run as a program it is the engine with such a device: `BUDGET_MIB` is what it has.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from overpaint_worker.engine.models import ModelStore

MIB = 2**20
VARIABLE = "FAKE_ENGINE_BUDGET_MIB"


@dataclass
class Budget:
    """Memory for models. A model takes room for as long as anything refers to it."""

    total: int
    loads: list[str] = field(default_factory=list)
    refusals: int = 0
    _live: list[tuple[weakref.ref[Any], int]] = field(default_factory=list)

    @property
    def used(self) -> int:
        """Bytes of the models that are still there."""
        return sum(size for unet, size in self._live if unet() is not None)

    def rule(self, store: ModelStore) -> None:
        """Let the models of a store live in this memory."""
        for family in store._families.values():
            family.load = self._limited(family.load)  # type: ignore[method-assign]

    def _limited(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def limited(entry: Any, device: Any) -> Any:
            model = load(entry, device)
            size = sum(p.numel() * p.element_size() for p in model._unet.parameters())
            if self.used + size > self.total:
                self.refusals += 1
                raise torch.OutOfMemoryError(
                    f"tried to allocate {size} bytes, {self.total - self.used} are free"
                )
            self._live.append((weakref.ref(model._unet), size))
            self.loads.append(entry.name)
            return model

        return limited


def main() -> None:
    """The engine, on such a device."""
    init = ModelStore.__init__

    def limited(self: ModelStore, *given: Any, **more: Any) -> None:
        init(self, *given, **more)
        Budget(round(float(os.environ[VARIABLE]) * MIB)).rule(self)

    ModelStore.__init__ = limited  # type: ignore[method-assign]
    from overpaint_worker.engine.__main__ import main as engine

    engine()


if __name__ == "__main__":
    main()
