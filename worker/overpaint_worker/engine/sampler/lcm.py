"""Multistep consistency sampling (Luo et al. 2023, "Latent Consistency Models", algorithm 3).

For models distilled to jump to the clean latent from any level; others come out blurred.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind


def lcm(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:
    """The denoised latent, noised anew to the next level: `D + s' * noise`."""
    for sigma, sigma_next in pairwise(sigmas):
        x = yield Evaluation(x, sigma)
        if sigma_next > 0:
            x = x + noise(x) * sigma_next
    return x


KIND = SamplerKind("lcm", lcm)
