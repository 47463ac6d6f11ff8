"""Samplers on a model whose answer is known: clean data that are normal with deviation D.

Its best denoiser is linear, `x D^2 / (D^2 + s^2)`, and the flow from noise to data has a closed form, so that
a sampler can be held against formulas written anew in float64, and against the truth.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from overpaint_worker.engine.sampler import SAMPLERS, Evaluation
from overpaint_worker.engine.sampler.steps import split
from overpaint_worker.engine.schedules import SCHEDULES
from overpaint_worker.engine.space import DiscreteSpace
from overpaint_worker.engine.trajectory import Noise
from tests.sampling import DEVIATION as D
from tests.sampling import best, drive, start_at

SIGMAS = DiscreteSpace().sigmas("karras", 12, 1.0)


def start(dtype=torch.float64):
    return start_at(SIGMAS[0], dtype)


def euler_again(x, s):
    for a, b in pairwise(s):
        x = best(x, a) + b / a * (x - best(x, a))  # the noise, shrunk to the next level
    return x


def dpmpp_2m_again(x, s):
    """Exponential integrator in t = -log sigma; the data prediction is extrapolated to the step's middle."""
    lam = -np.log(np.maximum(s, 1e-300))
    history = []
    for i in range(len(s) - 1):
        history.append(best(x, s[i]))
        if s[i + 1] == 0:
            return history[-1]
        h = lam[i + 1] - lam[i]
        middle = history[-1]
        if i:
            middle = middle + (history[-1] - history[-2]) / (lam[i] - lam[i - 1]) * h / 2
        x = math.exp(-h) * x + (1 - math.exp(-h)) * middle
    return x


@pytest.mark.parametrize(("name", "again"), [("euler", euler_again), ("dpmpp_2m", dpmpp_2m_again)])
def test_a_sampler_agrees_with_its_formula_written_anew(name, again):
    s = SIGMAS.numpy().astype(np.float64)
    _, x = drive(name, start(), SIGMAS.to(torch.float64))
    np.testing.assert_allclose(x.numpy(), again(start().numpy(), s), rtol=1e-9)


def test_ancestral_steps_agree_with_their_formula_written_anew():
    s = SIGMAS.numpy().astype(np.float64)
    draws = torch.randn(len(s), 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = iter(draws)
    _, x = drive("euler_ancestral", start(), SIGMAS.to(torch.float64), lambda _: next(drawn))
    y = start().numpy()
    for i, (a, b) in enumerate(pairwise(s)):
        if b == 0:
            y = best(y, a)
            break
        up = b * math.sqrt(1 - (b / a) ** 2)
        down = b * b / a
        y = best(y, a) + down / a * (y - best(y, a)) + up * draws[i].numpy()
    np.testing.assert_allclose(x.numpy(), y, rtol=1e-9)
    assert len(list(drawn)) == 2  # of 13: none for the step to 0, and one of twelve steps is that


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm_2", 2), ("dpmpp_2m", 2)]
)
def test_the_error_falls_with_the_order_of_the_sampler(name, order):
    high, low = 10.0, 0.2
    exact = start() * math.sqrt((low**2 + D**2) / (high**2 + D**2))
    errors = []
    for n in (64, 128, 256):
        sigmas = torch.logspace(math.log10(high), math.log10(low), n + 1, dtype=torch.float64)
        _, x = drive(name, start(), sigmas)
        errors.append(float((x - exact).abs().max()))
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_every_sampler_ends_finite_with_every_schedule(name, scheduler):
    for steps in (1, 2, 9):
        drop = SAMPLERS[name].drop_penultimate
        sigmas = DiscreteSpace().sigmas(scheduler, steps, 0.8, drop_penultimate=drop)
        asked, x = drive(name, start(torch.float32), sigmas, Noise(1))
        assert torch.isfinite(x).all()
        assert all(want.sigma > 0 for want in asked)
        assert all(want.sigma.dim() == 0 and want.sigma.device.type == "cpu" for want in asked)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_to_zero_is_the_denoised_latent(name):
    sigmas = torch.tensor([3.0, 0.0])
    _, x = drive(name, start(torch.float32), sigmas, Noise(1))
    torch.testing.assert_close(x, best(start(torch.float32), sigmas[0]))


def test_ancestral_noise_splits_the_next_level():
    sigma, after = torch.tensor(5.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    down, up = split(sigma, after)
    assert float(down**2 + up**2) == pytest.approx(4.0)
    assert float(down) == pytest.approx(4 / 5)


def test_ancestral_trajectories_of_pure_noise_keep_the_variance_of_their_level():
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0])
    x = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0)) * 8
    _, end = drive("euler_ancestral", x, sigmas, Noise(5), denoiser=lambda x, _: torch.zeros_like(x))
    assert float(end.std()) == pytest.approx(1.0, rel=0.02)


def test_an_evaluation_asks_at_the_latent_and_level_it_names():
    asked, _ = drive("euler", start(), SIGMAS)
    assert isinstance(asked[0], Evaluation)
    assert torch.equal(asked[0].x, start())
    assert [float(want.sigma) for want in asked] == SIGMAS[:-1].tolist()
