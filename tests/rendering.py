"""Rendering with the tiny models in this process: what the engine's integration tests share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from overpaint_shared.settings import Limits
from overpaint_worker import protocol as p
from overpaint_worker.engine.assemble import describe, open_device, set_up_torch
from overpaint_worker.engine.clipseg.store import SegmenterStore
from overpaint_worker.engine.conductor import Conductor
from overpaint_worker.engine.limits import FixedLimits
from overpaint_worker.engine.loop import Loop
from overpaint_worker.engine.models import ModelStore
from overpaint_worker.engine.session import House
from overpaint_worker.registry import Entry, Registry
from tests.device import DEVICE_NAME

set_up_torch(threads=1)  # as an engine starts: also for tests that build a part of it by themselves
DEVICE = open_device(DEVICE_NAME)
PARITY = Path(__file__).parent / "data" / "parity"
INPUTS = PARITY / "inputs"


@cache
def house(registry: Path, dtype: str = "float32", limits: Limits | None = None, kept: int = 9) -> House:
    """The tiny models, each loaded once for all tests of a run; what they compute in is the test's affair."""
    names = _computed_in(dtype, Registry.load(registry))
    return House(
        models=ModelStore(names, DEVICE, kept), segmenters=SegmenterStore(names, DEVICE),
        limits=limits or Limits(), device=describe(DEVICE),
    )  # fmt: skip


def _computed_in(dtype: str, registry: Registry) -> Registry:
    def told(entries: Mapping[str, Entry]) -> Any:
        return {name: entry.model_copy(update={"dtype": dtype}) for name, entry in entries.items()}

    return replace(
        registry,
        models=told(registry.models),
        controlnets=told(registry.controlnets),
        vaes=told(registry.vaes),
    )


@dataclass
class Kitchen:
    """A conductor, and all that it said."""

    conductor: Conductor
    said: list[p.ToWorker] = field(default_factory=list)

    def ends(self) -> dict[str, Any]:
        """The last word on each job."""
        return {m.job: m for m in self.said if isinstance(m, p.Done | p.Failed | p.Cancelled)}


def kitchen(registry: Path, rows: int = 16, dtype: str = "float32") -> Kitchen:
    """A conductor whose passes have up to `rows` rows."""
    said: list[p.ToWorker] = []
    return Kitchen(Conductor(house(registry, dtype), said.append, loop=Loop(FixedLimits(rows))), said)


def request(
    name: str, spec: Mapping[str, Any], inputs: Mapping[str, bytes] | None = None, **more: Any
) -> p.Render:
    """A job with pictures from the parity inputs, unless others are given."""
    files = inputs if inputs is not None else {path.name: path.read_bytes() for path in INPUTS.iterdir()}
    return p.Render(job=name, token=1, spec_json=json.dumps(spec), inputs=files, **more)


def render(
    registry: Path, requests: Iterable[p.Render], rows: int = 16, dtype: str = "float32"
) -> dict[str, Any]:
    """Render jobs together; the last word on each."""
    k = kitchen(registry, rows, dtype)
    for r in requests:
        k.conductor.submit(r)
    k.conductor.run_until_idle()
    k.conductor.close()
    return k.ends()


def img2img(
    prompt: str = "a red brick house", *, image: str = "img64.png", **sampling: Any
) -> dict[str, Any]:
    """A small job of the tiny model."""
    chosen = {"seed": 42, "steps": 4, "cfg": 7.0, "sampler": "euler", "scheduler": "normal", "denoise": 0.6}
    return {
        "version": 1, "model": "tiny", "source": {"image": image}, "method": {"kind": "img2img"},
        "prompt": prompt, "negative_prompt": "blurry", "sampling": {**chosen, **sampling},
    }  # fmt: skip


def pixels(data: bytes) -> np.ndarray:
    """An encoded picture as [H, W, C] of whole levels."""
    import io

    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int16)
