"""DPM-Solver-2 (Lu et al. 2022, "DPM-Solver") with ancestral noise, eta 1 (Ho et al. 2020)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind
from overpaint_worker.engine.sampler.steps import middle, slope, split


def dpm_2_ancestral(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:
    """`dpm_2` to `down`, then fresh noise of `up`; the last step lands on the denoised latent itself."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield Evaluation(x, sigma)
        down, up = split(sigma, sigma_next)
        if down == 0:
            x = denoised
            continue
        mid = middle(sigma, down)
        x_mid = x + slope(x, denoised, sigma) * (mid - sigma)
        d = slope(x_mid, (yield Evaluation(x_mid, mid)), mid)
        x = x + d * (down - sigma) + noise(x) * up
    return x


KIND = SamplerKind("dpm_2_ancestral", dpm_2_ancestral, drop_penultimate=True)
