"""Samplers, one file each, and the table of them by name."""

from typing import Final

from overpaint_worker.engine.sampler import dpmpp_2m, euler, euler_ancestral
from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind

SAMPLERS: Final[dict[str, SamplerKind]] = {
    module.KIND.name: module.KIND for module in (euler, euler_ancestral, dpmpp_2m)
}

__all__ = ["SAMPLERS", "Evaluation", "Noise", "Sampler", "SamplerKind"]
