"""What a spare engine does in advance: all of a start that needs no device.

It imports what rendering and loading import, and computes the digests of the weights. The registry is read
again when the spare becomes the engine, so a registry that changed meanwhile counts.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

if TYPE_CHECKING:
    from overpaint_worker.engine.families.weights import HashCache
    from overpaint_worker.engine.options import EngineOptions

log = structlog.get_logger(__name__)

NICE: Final = 10
KILLED_FIRST: Final = "900"
_OOM_SCORE: Final = Path("/proc/self/oom_score_adj")

MODULES: Final = (
    "overpaint_worker.engine.assemble",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.controlnets.controlnet",
    "diffusers.loaders.single_file_utils",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clipseg.modeling_clipseg",
    "transformers.models.vit.image_processing_pil_vit",
    "safetensors.torch",
)
"""What a start and the load of a model import."""


class Warming:
    """The spare's time before `Begin`. `hashes` holds the digests afterwards."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._score = _read_score()
        self.hashes: HashCache | None = None

    def run(self) -> None:
        """Warm up in a thread of low priority: only a thread can be made less nice again by ending."""
        os.environ.setdefault(
            "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
        )  # ask the driver without opening the device
        _write_score(KILLED_FIRST)
        thread = threading.Thread(target=self._warm, name="warming")
        thread.start()
        thread.join()

    def over(self) -> None:
        """The spare becomes the engine: it is no longer what the system ends first."""
        if self._score is not None:
            _write_score(self._score)

    def _warm(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            self._import()
            self._hash()
        except Exception as error:  # the start itself tells what is wrong
            log.info("spare engine not warm", action="spare_not_warm", error=repr(error))

    def _import(self) -> None:
        for module in MODULES:
            import_module(module)
        from overpaint_worker.engine.families.vocabulary import clip

        clip()

    def _hash(self) -> None:
        import torch

        from overpaint_worker.engine.clipseg.store import SegmenterStore
        from overpaint_worker.engine.families.weights import HashCache
        from overpaint_worker.engine.models import ModelStore
        from overpaint_worker.registry import Registry

        registry, nowhere = Registry.load(self._options.registry), torch.device("cpu")
        self.hashes = HashCache(self._options.hashes)
        ModelStore(registry, nowhere, hashes=self.hashes).catalogue()
        SegmenterStore(registry, nowhere, self.hashes).catalogue()


def _read_score() -> str | None:
    try:
        return _OOM_SCORE.read_text()
    except OSError:
        return None


def _write_score(score: str) -> None:
    with suppress(OSError):
        _OOM_SCORE.write_text(score)
