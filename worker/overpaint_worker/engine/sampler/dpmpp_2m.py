"""DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2), in sigma: t = -log sigma, h = t' - t."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind


def dpmpp_2m(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:  # noqa: ARG001 - draws nothing
    """Second order from the last two denoised latents; the first step and the step to 0 are first order."""
    before: Tensor | None = None
    h_before = torch.tensor(0.0)
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield Evaluation(x, sigma)
        h = sigma.log() - sigma_next.log()  # to sigma 0 it is infinite, and expm1(-h) is -1
        if before is None or sigma_next == 0:
            ahead = denoised
        else:
            r = h_before / h
            ahead = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * before
        x = (sigma_next / sigma) * x - torch.expm1(-h) * ahead
        before, h_before = denoised, h
    return x


KIND = SamplerKind("dpmpp_2m", dpmpp_2m)
