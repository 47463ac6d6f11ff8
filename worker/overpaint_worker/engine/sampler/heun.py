"""Heun's method on the probability flow ODE (Karras et al. 2022, algorithm 1 without churn)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind
from overpaint_worker.engine.sampler.steps import slope


def heun(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:  # noqa: ARG001 - draws nothing
    """The mean of the slopes at both ends of the step; the step to 0, where there is none, is Euler's."""
    for sigma, sigma_next in pairwise(sigmas):
        d = slope(x, (yield Evaluation(x, sigma)), sigma)
        if sigma_next > 0:
            ahead = x + d * (sigma_next - sigma)
            d = (d + slope(ahead, (yield Evaluation(ahead, sigma_next)), sigma_next)) / 2
        x = x + d * (sigma_next - sigma)
    return x


KIND = SamplerKind("heun", heun)
