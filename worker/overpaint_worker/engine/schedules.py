"""Schedules: how a number of steps is spread over a space's noise levels. One function each, one table.

A schedule gets the space and `n`, and returns its noise levels falling to a final 0, usually `n + 1` of them.
Formulas: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (karras,
rho 7); Lu et al. 2022, "DPM-Solver" (exponential: even in log sigma); Lee et al. 2024, "Beta Sampling is All
You Need" (beta); Sabour et al. 2024, "Align Your Steps" (kl_optimal); Polyak et al. 2024, "Movie Gen"
(linear_quadratic). Which entry of the table, which rounding and which end each takes is the reference's
choice, so that tables agree to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from overpaint_worker.engine.space import Space

Schedule = Callable[["Space", int], Tensor]

KARRAS_RHO: Final = 7.0
BETA_SHAPE: Final = 0.6
LINEAR_PART: Final = 0.025
"""Share of the noise that the linear half of `linear_quadratic` removes."""


def _closed(levels: Tensor | list[float]) -> Tensor:
    """Float32 levels with the final 0."""
    head = levels if isinstance(levels, Tensor) else torch.tensor(levels, dtype=torch.float32)
    return torch.cat([head.to(torch.float32), torch.zeros(1)])


def normal(space: Space, n: int) -> Tensor:
    """Even in time from the noisiest level to the clearest."""
    return _closed(space.sigma(torch.linspace(len(space.table) - 1, 0, n)))


def sgm_uniform(space: Space, n: int) -> Tensor:
    """Even in time, without the clearest level."""
    return _closed(space.sigma(torch.linspace(len(space.table) - 1, 0, n + 1)[:-1]))


def simple(space: Space, n: int) -> Tensor:
    """Every (T/n)th level of the table, from its noisy end."""
    size = len(space.table)
    pace = size / n  # rounded before it is multiplied: 19 * (1000 / 38) is short of 500, and stays so
    return _closed(space.table[[size - 1 - int(i * pace) for i in range(n)]])


def ddim_uniform(space: Space, n: int) -> Tensor:
    """Every (T//n)th level of the table, from its clear end: more than `n` where T is no multiple of it."""
    return _closed(space.table[1 :: max(len(space.table) // n, 1)].flip(0))


def karras(space: Space, n: int) -> Tensor:
    """Even in the 7th root of sigma."""
    high, low = space.sigma_max ** (1 / KARRAS_RHO), space.sigma_min ** (1 / KARRAS_RHO)
    return _closed((high + torch.linspace(0, 1, n) * (low - high)) ** KARRAS_RHO)


def exponential(space: Space, n: int) -> Tensor:
    """Even in the logarithm of sigma."""
    return _closed(torch.linspace(math.log(space.sigma_max), math.log(space.sigma_min), n).exp())


def beta(space: Space, n: int) -> Tensor:
    """Even in the quantiles of a beta distribution over the table: dense at both ends. No level repeats."""
    import numpy as np
    from scipy.stats import beta as distribution

    shares = distribution.ppf(1 - np.linspace(0, 1, n, endpoint=False), BETA_SHAPE, BETA_SHAPE)
    places = [int(i) for i in np.rint(shares * (len(space.table) - 1))]
    return _closed(space.table[list(dict.fromkeys(places))])


def kl_optimal(space: Space, n: int) -> Tensor:
    """Even in the arc tangent of sigma: least Kullback-Leibler divergence for Gaussian data."""
    share = torch.arange(n) / max(n - 1, 1)
    angle = share * math.atan(space.sigma_min) + (1 - share) * math.atan(space.sigma_max)
    return _closed(angle.tan())


def linear_quadratic(space: Space, n: int) -> Tensor:
    """Half of the steps even over the first 2.5 % of the noise, the rest on a parabola from there."""
    linear = n // 2
    if not linear:
        return _closed([space.sigma_max])
    slope = LINEAR_PART / linear
    rest = n - linear
    excess = linear - LINEAR_PART * n
    bend = excess / (linear * rest**2)
    tilt = slope - 2 * excess / rest**2
    removed = [slope * i for i in range(linear)]
    removed += [bend * i**2 + tilt * i + bend * linear**2 for i in range(linear, n)]
    return _closed([(1 - share) * space.sigma_max for share in removed])


SCHEDULES: Final[dict[str, Schedule]] = {
    f.__name__: f
    for f in (
        normal, karras, exponential, sgm_uniform, simple, ddim_uniform, beta, linear_quadratic, kl_optimal,
    )
}  # fmt: skip
