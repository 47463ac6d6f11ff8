"""The other samplers against their formulas, derived a second time: on a linear model a step is one factor.

With `share(s)` of a latent's distance `y` to the data's mean kept by the denoiser, the flow's slope is
`(1 - share(s)) / s * y = s / (s^2 + deviation^2) * y`. Everything here is plain float arithmetic in numpy.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchsde

from overpaint_worker.engine.sampler import SAMPLERS
from overpaint_worker.engine.space import DiscreteSpace
from overpaint_worker.engine.trajectory import Noise
from tests.sampling import DEVIATION, best, drive, share, start_at

MEAN = 0.3
SIGMAS = DiscreteSpace().sigmas("karras", 9, 1.0).to(torch.float64)
LEVELS = [float(s) for s in SIGMAS]


def about_mean(x, sigma):
    return best(x, sigma, MEAN)


class Recorded:
    """Noise drawn beforehand; `path` is a Brownian tree of its own."""

    def __init__(self, seed=7):
        self.draws = torch.randn(
            40, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        self.drawn = 0
        self._noise = Noise(seed)
        self._tree = torchsde.BrownianTree(
            t0=LEVELS[-2], w0=torch.zeros(1, 1, 2, 2), t1=LEVELS[0], entropy=seed
        )

    def __call__(self, like):
        self.drawn += 1
        return self.draws[self.drawn - 1]

    def path(self, like, sigmas):
        return self._noise.path(like, sigmas)

    def increment(self, high, low):
        """W(low) - W(high), over the root of the distance."""
        low_inside, high_inside = max(low, round(LEVELS[-2], 6)), min(high, round(LEVELS[0], 6))
        w = self._tree(low_inside, high_inside)
        return -w.numpy().astype(np.float64) / math.sqrt(high - low)


def slope(s):
    return s / (s**2 + DEVIATION**2)


def heun(y, recorded):
    for a, b in pairwise(LEVELS[:-1]):
        h = b - a
        y = y * (1 + h / 2 * (slope(a) + slope(b) * (1 + h * slope(a))))
    return y * share(LEVELS[-2])


def dpm_2(y, recorded):
    for a, b in pairwise(LEVELS[:-1]):
        m = math.sqrt(a * b)
        y = y * (1 + (b - a) * slope(m) * (1 + (m - a) * slope(a)))
    return y * share(LEVELS[-2])


def ancestral(a, b):
    """DDPM's posterior between two levels: where to step, and the deviation of what is added."""
    return b * b / a, b * math.sqrt(1 - b * b / (a * a))


def dpm_2_ancestral(y, recorded):
    for i, (a, b) in enumerate(pairwise(LEVELS[:-1])):
        down, up = ancestral(a, b)
        m = math.sqrt(a * down)
        y = y * (1 + (down - a) * slope(m) * (1 + (m - a) * slope(a))) + up * recorded.draws[i].numpy()
    return y * share(LEVELS[-2])


def dpmpp_2s_ancestral(y, recorded):
    for i, (a, b) in enumerate(pairwise(LEVELS[:-1])):
        down, up = ancestral(a, b)
        m = math.sqrt(a * down)
        at_middle = m / a + (1 - m / a) * share(a)
        y = y * (down / a + (1 - down / a) * share(m) * at_middle) + up * recorded.draws[i].numpy()
    return y * share(LEVELS[-2])


def dpmpp_sde(y, recorded):
    for a, b in pairwise(LEVELS[:-1]):
        m = math.sqrt(a * b)
        down, up = ancestral(a, m)
        at_middle = y * (down / a + (1 - down / a) * share(a)) + up * recorded.increment(a, m)
        down, up = ancestral(a, b)
        y = y * down / a + (1 - down / a) * share(m) * at_middle + up * recorded.increment(a, b)
    return y * share(LEVELS[-2])


def dpmpp_2m_sde(y, recorded):
    """The SDE's solution keeps (b/a)^2 of the distance to the data prediction, here a line through two."""
    before = None
    for a, b in pairwise(LEVELS[:-1]):
        now = y * share(a)
        middle = now
        if before is not None:
            a_before, d_before = before
            middle = now + (now - d_before) / math.log(a_before / a) * math.log(a / b) / 2
        kept = (b / a) ** 2
        before = (a, now)
        y = kept * y + (1 - kept) * middle + b * math.sqrt(1 - kept) * recorded.increment(a, b)
    return y * share(LEVELS[-2])


def lcm(y, recorded):
    for i, (a, b) in enumerate(pairwise(LEVELS[:-1])):
        y = y * share(a) + b * recorded.draws[i].numpy()
    return y * share(LEVELS[-2])


def ddim(y, recorded):
    """Song's own form: in the variance-preserving view, predicted data and predicted noise, recombined."""
    for a, b in pairwise(LEVELS):
        kept, kept_next = 1 / (1 + a * a), 1 / (1 + b * b)
        x = y * math.sqrt(kept)
        data = y * share(a)
        noise = (x - math.sqrt(kept) * data) / math.sqrt(1 - kept)
        y = (math.sqrt(kept_next) * data + math.sqrt(1 - kept_next) * noise) / math.sqrt(kept_next)
    return y


AGAIN = [heun, dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, dpmpp_2m_sde, lcm, ddim]


@pytest.mark.parametrize("again", AGAIN, ids=lambda f: f.__name__)
def test_a_sampler_agrees_with_its_formula_derived_anew_on_a_linear_model(again):
    recorded = Recorded()
    begin = start_at(SIGMAS[0])
    _, x = drive(again.__name__, begin, SIGMAS, recorded, about_mean)
    expected = MEAN + again(begin.numpy() - MEAN, recorded)
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-9)


DRAWS = {"dpm_2_ancestral": 8, "dpmpp_2s_ancestral": 8, "lcm": 8, "euler_ancestral": 8}
"""One for each of nine steps, but for the step to 0."""


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_draws_once_a_step_and_never_for_the_step_to_zero(name):
    recorded = Recorded()
    drive(name, start_at(SIGMAS[0]), SIGMAS, recorded)
    assert recorded.drawn == DRAWS.get(name, 0)


def middles(to):
    return [float(m) for a, b in pairwise(LEVELS[:-1]) for m in (a, math.sqrt(a * to(a, b)))] + [LEVELS[-2]]


ASKED = {
    "heun": [LEVELS[0], *np.repeat(LEVELS[1:-1], 2)],
    "dpm_2": middles(lambda _, b: b),
    "dpmpp_sde": middles(lambda _, b: b),
    "dpm_2_ancestral": middles(lambda a, b: b * b / a),
    "dpmpp_2s_ancestral": middles(lambda a, b: b * b / a),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_asks_at_the_levels_of_its_formula_and_no_oftener(name):
    asked, _ = drive(name, start_at(SIGMAS[0]), SIGMAS, Recorded())
    assert len(asked) == (17 if name in ASKED else 9)
    np.testing.assert_allclose(
        [float(want.sigma) for want in asked], ASKED.get(name, LEVELS[:-1]), rtol=1e-12
    )


STOCHASTIC = ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde"]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_sampler_lands_on_the_distribution_of_the_data(name):
    high, low = 10.0, 0.2
    sigmas = torch.logspace(math.log10(high), math.log10(low), 49, dtype=torch.float64)
    begin = torch.randn(1, 1, 150, 150, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    begin = MEAN + begin * math.hypot(high, DEVIATION)
    _, x = drive(name, begin, sigmas, Noise(5), about_mean)
    # of 22500 values the deviation is known to 0.5 %, the mean to 0.005; euler's own error is of first order
    assert float(x.std()) == pytest.approx(math.hypot(low, DEVIATION), rel=0.05 if "euler" in name else 0.02)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    # noise is added to data on the way up, so start and end share the variance of the end, known to 0.05
    together = float(((x - x.mean()) * (begin - begin.mean())).mean())
    assert together == pytest.approx(low**2 + DEVIATION**2, abs=0.15)


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde"])
def test_more_steps_follow_the_same_brownian_path_ever_more_closely(name):
    begin = 10 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(torch.float64)
    few, more, most = (
        drive(name, begin, torch.logspace(1, math.log10(0.2), n + 1, dtype=torch.float64), Noise(5))[1]
        for n in (20, 80, 320)
    )
    assert float((few - most).std()) < 0.12 * float(most.std())
    assert float((few - most).std()) > 3 * float((more - most).std())


def test_ddim_is_eulers_method_bit_for_bit():
    x = start_at(SIGMAS[0], torch.float32)
    euler, ddim_ = (drive(name, x, SIGMAS.float())[1] for name in ("euler", "ddim"))
    assert torch.equal(euler, ddim_)
    assert SAMPLERS["ddim"].fresh_blend
    assert not SAMPLERS["euler"].fresh_blend


def test_only_the_second_order_samplers_between_levels_drop_the_last_but_one():
    assert {name for name, kind in SAMPLERS.items() if kind.drop_penultimate} == {"dpm_2", "dpm_2_ancestral"}
