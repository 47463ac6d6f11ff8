"""DPM-Solver-2 (Lu et al. 2022, "DPM-Solver", algorithm 1) as an ODE in sigma: the midpoint method.

The middle of a step is that of log sigma, as in DPM-Solver; the slope found there is taken over the whole
step, in sigma (Karras et al. 2022).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from overpaint_worker.engine.sampler.base import Evaluation, Noise, Sampler, SamplerKind
from overpaint_worker.engine.sampler.steps import middle, slope


def dpm_2(x: Tensor, sigmas: Tensor, noise: Noise) -> Sampler:  # noqa: ARG001 - draws nothing
    """The slope of the step's middle; the step to 0, whose logarithm has no middle, is Euler's."""
    for sigma, sigma_next in pairwise(sigmas):
        d = slope(x, (yield Evaluation(x, sigma)), sigma)
        if sigma_next > 0:
            mid = middle(sigma, sigma_next)
            x_mid = x + d * (mid - sigma)
            d = slope(x_mid, (yield Evaluation(x_mid, mid)), mid)
        x = x + d * (sigma_next - sigma)
    return x


KIND = SamplerKind("dpm_2", dpm_2, drop_penultimate=True)
