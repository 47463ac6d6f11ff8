"""Terms that several samplers share. Sigmas are scalar tensors; latents are [1, C, h, w]."""

from __future__ import annotations

import torch
from torch import Tensor


def slope(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """`dx/ds` of the probability flow ODE: `(x - D) / s` (Karras et al. 2022, algorithm 1)."""
    return (x - denoised) / sigma


def toward(x: Tensor, denoised: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
    """Exact solution of the ODE from `sigma` to `target` if the denoised latent stayed what it is.

    `(s'/s) x + (1 - s'/s) D`: the first-order step of Lu et al. 2022, "DPM-Solver++". To sigma 0 it is the
    denoised latent.
    """
    return (target / sigma) * x - torch.expm1(target.log() - sigma.log()) * denoised


def middle(sigma: Tensor, target: Tensor) -> Tensor:
    """Half-way in log sigma: the geometric mean.

    In this order of operations: a Brownian path asked a rounding error away is off by that error's root.
    """
    log = sigma.log()
    return (log + 0.5 * (target.log() - log)).exp()


def split(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up): step down to `down`, then add noise of `up`; down^2 + up^2 = sigma_next^2.

    DDPM's variance (Ho et al. 2020), eta 1 in Song et al. 2020, "Denoising Diffusion Implicit Models".
    """
    up = torch.minimum(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up
