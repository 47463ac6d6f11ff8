"""Euler's method with ancestral noise, eta 1: fresh noise of DDPM's variance each step (Ho et al. 2020)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind


def split(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up): step down to `down`, then add noise of `up`; down^2 + up^2 = sigma_next^2."""
    up = torch.minimum(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def euler_ancestral(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:
    """Euler to `down`, then fresh noise of `up`; the last step lands on the denoised latent itself."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield Evaluation(x, sigma)
        down, up = split(sigma, sigma_next)
        x = denoised if down == 0 else x + (x - denoised) / sigma * (down - sigma) + noise(x) * up
    return x


KIND = SamplerKind("euler_ancestral", euler_ancestral)
