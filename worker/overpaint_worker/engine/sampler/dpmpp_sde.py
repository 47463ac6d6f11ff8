"""DPM-Solver++ for the diffusion SDE, two evaluations a step (Lu et al. 2022, "DPM-Solver++").

r 1/2, eta 1: as 2S, but with the noise of a Brownian path added at the middle of the step too.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind
from overpaint_worker.engine.sampler.steps import middle, split, toward


def dpmpp_sde(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:
    """Both parts of a step begin at `x`: the first finds the denoised latent of the middle."""
    path = noise.path(x, sigmas)
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield Evaluation(x, sigma)
        if sigma_next == 0:
            return denoised
        mid = middle(sigma, sigma_next)
        down, up = split(sigma, mid)
        x_mid = toward(x, denoised, sigma, down) + path(sigma, mid) * up
        denoised = yield Evaluation(x_mid, mid)
        down, up = split(sigma, sigma_next)
        x = toward(x, denoised, sigma, down) + path(sigma, sigma_next) * up
    return x


KIND = SamplerKind("dpmpp_sde", dpmpp_sde)
