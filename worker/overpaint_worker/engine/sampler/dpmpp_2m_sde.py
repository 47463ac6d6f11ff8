"""SDE-DPM-Solver++(2M), midpoint (Lu et al. 2022, "DPM-Solver++"), eta 1, in t = -log sigma.

Over a step h = t' - t the SDE keeps `exp(-2 h)` of the distance to the denoised latent: `exp(-h)` is the
flow's, and as much again is given up for the noise that is added.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind


def dpmpp_2m_sde(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:
    """Second order from the last two denoised latents, with the noise of a Brownian path."""
    path = noise.path(x, sigmas)
    before: Tensor | None = None
    h_before = torch.tensor(0.0)
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield Evaluation(x, sigma)
        if sigma_next == 0:
            return denoised
        h = sigma.log() - sigma_next.log()
        gain = -torch.expm1(-2 * h)
        ahead = denoised if before is None else denoised + (denoised - before) * h / h_before / 2
        kept = sigma_next / sigma * torch.exp(-h)
        x = kept * x + gain * ahead + path(sigma, sigma_next) * sigma_next * gain.sqrt()
        before, h_before = denoised, h
    return x


KIND = SamplerKind("dpmpp_2m_sde", dpmpp_2m_sde)
