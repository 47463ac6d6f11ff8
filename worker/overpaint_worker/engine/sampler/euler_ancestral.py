"""Euler's method with ancestral noise, eta 1: fresh noise of DDPM's variance each step (Ho et al. 2020)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind
from overpaint_worker.engine.sampler.steps import slope, split


def euler_ancestral(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:
    """Euler to `down`, then fresh noise of `up`; the last step lands on the denoised latent itself."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield Evaluation(x, sigma)
        down, up = split(sigma, sigma_next)
        x = denoised if down == 0 else x + slope(x, denoised, sigma) * (down - sigma) + noise(x) * up
    return x


KIND = SamplerKind("euler_ancestral", euler_ancestral)
