"""Euler's method on the probability flow ODE (Karras et al. 2022, algorithm 2 without churn)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind


def euler(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:  # noqa: ARG001 - draws nothing
    """`x += (x - D(x, s)) / s * (s' - s)`."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield Evaluation(x, sigma)
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
    return x


KIND = SamplerKind("euler", euler)
