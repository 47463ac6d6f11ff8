"""What a sampler is: a generator that yields what it wants evaluated and receives the denoised latent.

So each reads like its formula, and the loop can interleave any of them, also those that evaluate twice a
step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(slots=True, frozen=True)
class Evaluation:
    """Ask for the denoised latent of `x` at `sigma`."""

    x: Tensor
    """[1, C, h, w], float32."""
    sigma: Tensor
    """Scalar, float32, on the CPU (arithmetic with it never waits for a device)."""


Path = Callable[[Tensor, Tensor], Tensor]
"""`path(sigma, target)`: standard normal noise, a Brownian path's increment from one level to another."""


class Noise(Protocol):
    """A job's own noise."""

    def __call__(self, like: Tensor) -> Tensor:
        """Fresh standard normal noise in the shape and on the device of `like`; each call draws anew."""
        ...

    def path(self, like: Tensor, sigmas: Tensor) -> Path:
        """A Brownian path over the levels of `sigmas` above 0."""
        ...


Sampler = Generator[Evaluation, Tensor, Tensor]
"""Yields evaluations, is sent denoised latents [1, C, h, w], returns the final latent [1, C, h, w]."""


@dataclass(slots=True, frozen=True)
class SamplerKind:
    """A sampler, and what a schedule and a mask must know of it."""

    name: str
    begin: Callable[[Tensor, Tensor, Noise], Sampler]
    """`begin(x [1, C, h, w], sigmas [n + 1] falling to 0, noise)`."""
    drop_penultimate: bool = False
    """It evaluates between levels: the schedule's last level before 0 is left out (see `job_sigmas`)."""
    fresh_blend: bool = False
    """What a mask spares is noised with noise of its own, of the next seed, not with the start's."""
