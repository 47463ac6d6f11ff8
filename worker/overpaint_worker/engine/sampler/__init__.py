"""Samplers, one file each, and the table of them by name."""

from typing import Final

from overpaint_worker.engine.sampler import (
    ddim,
    dpm_2,
    dpm_2_ancestral,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
)
from overpaint_worker.engine.sampler.base import Evaluation, Noise, Path, Sampler, SamplerKind

SAMPLERS: Final[dict[str, SamplerKind]] = {
    module.KIND.name: module.KIND
    for module in (
        euler, euler_ancestral, heun, dpm_2, dpm_2_ancestral, dpmpp_2m, dpmpp_2s_ancestral, dpmpp_2m_sde,
        dpmpp_sde, ddim, lcm,
    )
}  # fmt: skip

__all__ = ["SAMPLERS", "Evaluation", "Noise", "Path", "Sampler", "SamplerKind"]
