"""DPM-Solver++(2S) (Lu et al. 2022, "DPM-Solver++", algorithm 1, r 1/2) with ancestral noise, eta 1."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind
from overpaint_worker.engine.sampler.steps import middle, split, toward


def dpmpp_2s_ancestral(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:
    """To `down` with the denoised latent of the step's middle, then fresh noise of `up`."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield Evaluation(x, sigma)
        down, up = split(sigma, sigma_next)
        if down > 0:  # the step to 0 has no middle in log sigma
            mid = middle(sigma, down)
            denoised = yield Evaluation(toward(x, denoised, sigma, mid), mid)
        x = toward(x, denoised, sigma, down)
        if sigma_next > 0:
            x = x + noise(x) * up
    return x


KIND = SamplerKind("dpmpp_2s_ancestral", dpmpp_2s_ancestral)
