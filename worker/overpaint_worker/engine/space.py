"""Spaces: what noise level, model input and model output mean for a kind of model.

Everything above (samplers, masks, the loop) works on `sigma` and on denoised latents and never on a model's
raw output, so a family picks its space and nothing else changes. `DiscreteSpace` holds the variance-exploding
view of models that were trained on a table of noise levels (epsilon and v prediction); flow-matching models
fit the same protocol with sigma in 0..1.
"""

from __future__ import annotations

import math
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from overpaint_shared.errors import UnsupportedError
from overpaint_worker.engine.schedules import SCHEDULES

Prediction = Literal["epsilon", "v"]

FULL_DENOISE: Final = 0.9999
"""Above this share the whole schedule runs."""

ALWAYS: Final = 1e9
"""A sigma above every schedule: `at_percent(0)`."""


class Space(Protocol):
    """What samplers, schedules and masks need to know of a kind of model.

    Shapes: `x`, `z0`, `noise`, `out` are [R, C, h, w]; `sigma` is a scalar tensor or [R], float32.
    """

    table: Tensor
    """Noise levels of training, rising, float32 [T], on the CPU."""
    sigma_min: float
    sigma_max: float

    def sigma(self, t: Tensor) -> Tensor:
        """The noise level at time `t` (0..T-1, fractions allowed, clamped)."""
        ...

    def timestep(self, sigma: Tensor) -> Tensor:
        """The time that the model is told at `sigma`: int64, shape of `sigma`, on the CPU."""
        ...

    def scale_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the model sees of a latent `x` at `sigma`."""
        ...

    def denoised(self, out: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean latent that the model's raw output `out` stands for at `x`, `sigma`."""
        ...

    def noised(self, z0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The clean latent `z0` at noise level `sigma`."""
        ...

    def start(self, z0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Where a trajectory begins; unlike `noised`, a full schedule starts at full variance."""
        ...

    def at_percent(self, share: float) -> float:
        """Sigma at a share (0..1) of the whole training schedule, whatever part of it a job runs."""
        ...

    def sigmas(self, scheduler: str, steps: int, denoise: float, *, drop_penultimate: bool = False) -> Tensor:
        """The noise levels of a job, float32 on the CPU, falling to 0."""
        ...


def job_sigmas(
    space: Space, scheduler: str, steps: int, denoise: float, *, drop_penultimate: bool = False
) -> Tensor:
    """The last `steps` steps of a schedule of `int(steps / denoise)`, falling to 0; empty for denoise 0.

    `drop_penultimate`: for samplers that evaluate between levels, one level more is made and the last before
    0 left out. Raises `UnsupportedError` for a scheduler that is not in `SCHEDULES`.
    """
    schedule = SCHEDULES.get(scheduler)
    if schedule is None:
        raise UnsupportedError(
            f"this engine has no scheduler {scheduler!r}",
            field="sampling.scheduler", value=scheduler, fix=f"use one of {', '.join(SCHEDULES)}",
        )  # fmt: skip
    if denoise <= 0:
        return torch.zeros(0)
    full = denoise > FULL_DENOISE
    total = (
        steps if full else int(steps / denoise)
    )  # Python's float division: int(7 / 0.07) is 99, and stays so
    levels = schedule(space, total + drop_penultimate)
    if drop_penultimate:
        levels = torch.cat([levels[:-2], levels[-1:]])
    return levels if full else levels[-(steps + 1) :]


class DiscreteSpace:
    """Models trained on T noise levels with "scaled linear" betas, predicting epsilon or v.

    Tables are computed in float64 and kept in float32; the logarithm is taken in float64 too. The model is
    told integer times only. Formulas: Ho et al. 2020 (epsilon), Salimans & Ho 2022 (v), Karras et al. 2022
    (sigma).
    """

    def __init__(
        self,
        prediction: Prediction = "epsilon",
        *,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        length: int = 1000,
    ) -> None:
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, length, dtype=torch.float64) ** 2
        kept = torch.cumprod(1 - betas, 0)
        sigmas = ((1 - kept) / kept) ** 0.5
        self.prediction: Prediction = prediction
        self.table = sigmas.to(torch.float32)
        self.sigma_min, self.sigma_max = float(self.table[0]), float(self.table[-1])
        self._log = sigmas.log().to(torch.float32)

    def sigma(self, t: Tensor) -> Tensor:
        """Interpolates the logarithm linearly between the table's neighbours of `t`."""
        t = t.to(torch.float32).clamp(0, len(self.table) - 1)
        low, high, share = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - share) * self._log[low] + share * self._log[high]).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The table's nearest entry by logarithm.

        Schedules that are even in time often stop half-way between two entries. Then the logarithm's last bit
        decides, in which devices differ; hence the CPU.
        """
        distance = (sigma.cpu().log().unsqueeze(0) - self._log.view(-1, *[1] * sigma.dim())).abs()
        return distance.argmin(0)

    def scale_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """`x / sqrt(sigma^2 + 1)`: unit variance."""
        return x / (_per_row(sigma, x) ** 2 + 1) ** 0.5

    def denoised(self, out: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Epsilon: `x - sigma * out`; v: `x / (sigma^2 + 1) - sigma / sqrt(sigma^2 + 1) * out`."""
        s = _per_row(sigma, x)
        if self.prediction == "epsilon":
            return x - out * s
        return x / (s**2 + 1) - out * s / (s**2 + 1) ** 0.5

    def noised(self, z0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """`z0 + sigma * noise`."""
        return z0 + noise * _per_row(sigma, z0)

    def start(self, z0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """`z0 + c * noise`; c is sigma, or `sqrt(1 + sigma^2)` where sigma is the noisiest level or above."""
        level = float(sigma)
        full = math.isclose(self.sigma_max, level, rel_tol=1e-5) or level > self.sigma_max
        return z0 + noise * (torch.sqrt(1 + sigma**2) if full else sigma)

    def at_percent(self, share: float) -> float:
        """0 or less: above all levels; 1 or more: 0; else sigma at `(1 - share) * (T - 1)`."""
        if share <= 0:
            return ALWAYS
        return 0.0 if share >= 1 else float(self.sigma(torch.tensor((1 - share) * (len(self.table) - 1))))

    def sigmas(self, scheduler: str, steps: int, denoise: float, *, drop_penultimate: bool = False) -> Tensor:
        """See `job_sigmas`."""
        return job_sigmas(self, scheduler, steps, denoise, drop_penultimate=drop_penultimate)


def _per_row(sigma: Tensor, like: Tensor) -> Tensor:
    """[R] or scalar sigma, shaped to multiply [R, C, h, w].

    A scalar may stay on the CPU: kernels take its value along, where a copy would wait for the device.
    """
    if sigma.dim() == 0:
        return sigma
    return sigma.to(like.device).reshape(-1, *[1] * (like.dim() - 1))
