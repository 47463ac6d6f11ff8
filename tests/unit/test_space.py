"""Noise levels and what they mean: against the reference's tables, and derived anew in float64."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from overpaint_shared.errors import UnsupportedError
from overpaint_worker.engine.schedules import SCHEDULES
from overpaint_worker.engine.space import ALWAYS, DiscreteSpace

TABLES = json.loads((Path(__file__).parents[1] / "data/parity/nodes/sigmas.json").read_text())
SPACE = DiscreteSpace()


def _training_sigmas() -> np.ndarray:
    """The definition, in numpy's float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    return np.sqrt((1 - kept) / kept)


TRAINING = _training_sigmas()


def _at(t: np.ndarray) -> np.ndarray:
    return np.exp(np.interp(t, np.arange(1000), np.log(TRAINING)))


@pytest.mark.parametrize("case", TABLES)
def test_every_table_of_the_reference_is_met(case):
    scheduler, sampler, steps, denoise = case.split("|")
    sigmas = SPACE.sigmas(scheduler, int(steps), float(denoise), drop_penultimate=sampler == "dpm_2")
    assert sigmas.dtype == torch.float32
    np.testing.assert_allclose(sigmas.numpy(), TABLES[case], rtol=1e-5, atol=0)


def test_the_parity_tables_are_all_here():
    assert len(TABLES) == 20


def _second_derivation(name: str, n: int) -> np.ndarray:
    low, high = TRAINING[0], TRAINING[-1]
    share = np.linspace(0, 1, n)
    levels = {
        "normal": lambda: _at(np.linspace(999, 0, n)),
        "sgm_uniform": lambda: _at(999 - 999 * np.arange(n) / n),
        "simple": lambda: np.array([TRAINING[999 - int(i * (1000 / n))] for i in range(n)]),
        "ddim_uniform": lambda: np.array([TRAINING[i] for i in range(1, 1000, 1000 // n)])[::-1],
        "karras": lambda: ((1 - share) * high ** (1 / 7) + share * low ** (1 / 7)) ** 7,
        "exponential": lambda: high ** (1 - share) * low**share,
        "kl_optimal": lambda: np.tan((1 - share) * math.atan(high) + share * math.atan(low)),
    }[name]()
    return np.append(levels, 0.0)


@pytest.mark.parametrize("n", [1, 2, 5, 20, 50])
@pytest.mark.parametrize(
    "name", ["normal", "sgm_uniform", "simple", "ddim_uniform", "karras", "exponential", "kl_optimal"]
)
def test_a_schedule_agrees_with_its_formula_in_float64(name, n):
    np.testing.assert_allclose(SPACE.sigmas(name, n, 1.0).numpy(), _second_derivation(name, n), rtol=1e-5)


def test_beta_takes_quantiles_of_its_distribution_and_repeats_no_level():
    from scipy.special import betainc  # the distribution function, which quantiles invert

    sigmas = SPACE.sigmas("beta", 20, 1.0).numpy()
    places = [int(np.abs(TRAINING - sigma).argmin()) for sigma in sigmas[:-1]]
    for i, place in enumerate(places):
        low, high = betainc(0.6, 0.6, np.clip((place + np.array([-0.5, 0.5])) / 999, 0, 1))
        assert low <= 1 - i / 20 <= high
    many = SPACE.sigmas("beta", 900, 1.0)
    assert len(many) < 901
    assert (many.diff() < 0).all()


def test_linear_quadratic_starts_straight_and_continues_without_a_kink():
    removed = 1 - SPACE.sigmas("linear_quadratic", 20, 1.0).numpy() / SPACE.sigma_max
    slopes = np.diff(removed)
    np.testing.assert_allclose(slopes[:10], 0.0025, rtol=1e-3)
    assert slopes[10] > slopes[9]
    np.testing.assert_allclose(np.diff(slopes[10:], n=1), np.diff(slopes[10:], n=1).mean(), rtol=1e-3)
    assert removed[-1] == 1


def test_simple_takes_the_places_that_the_references_division_gives():
    """1000 / 38 is rounded down, so 19 of it fall short of 500."""
    sigmas = SPACE.sigmas("simple", 38, 1.0)
    assert [int(place) for place in SPACE.timestep(sigmas[[18, 19, 20]])] == [999 - 473, 999 - 499, 999 - 526]


@pytest.mark.parametrize("n", [2, 3, 8, 21, 40])
def test_linear_quadratic_is_a_line_and_the_parabola_that_continues_it_to_all_of_the_noise(n):
    """The parabola is fixed by its value and slope where the line ends and by its end at (n, 1)."""
    line = n // 2
    slope = 0.025 / line
    bend = np.linalg.solve([[(n - line) ** 2]], [1 - 0.025 - slope * (n - line)])[0]
    i = np.arange(n + 1)
    removed = slope * i + bend * np.clip(i - line, 0, None) ** 2
    expected = (1 - removed) * TRAINING[-1]
    np.testing.assert_allclose(
        SPACE.sigmas("linear_quadratic", n, 1.0).numpy(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("n", [1, 2, 20, 61])
def test_beta_agrees_with_quantiles_found_by_bisection(n):
    from scipy.special import betainc

    places = []
    for i in range(n):
        low, high = 0.0, 1.0
        for _ in range(80):
            half = (low + high) / 2
            low, high = (half, high) if betainc(0.6, 0.6, half) < 1 - i / n else (low, half)
        places.append(round(high * 999))
    expected = [TRAINING[place] for place in dict.fromkeys(places)]
    np.testing.assert_allclose(SPACE.sigmas("beta", n, 1.0).numpy(), [*expected, 0.0], rtol=1e-5)


@pytest.mark.parametrize("denoise", [1.0, 0.6])
@pytest.mark.parametrize("name", SCHEDULES)
def test_samplers_between_levels_get_one_level_more_without_the_last_but_one(name, denoise):
    total = 7 if denoise == 1 else int(7 / denoise)
    whole = SPACE.sigmas(name, total + 1, 1.0).tolist()
    expected = [*whole[:-2], 0.0]
    expected = expected if denoise == 1 else expected[-8:]
    assert SPACE.sigmas(name, 7, denoise, drop_penultimate=True).tolist() == expected


@pytest.mark.parametrize("denoise", [1.0, 0.6, 0.05])
@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_falls_strictly_to_zero(name, steps, denoise):
    sigmas = SPACE.sigmas(name, steps, denoise)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert torch.isfinite(sigmas).all()


@pytest.mark.parametrize(("steps", "denoise", "total"), [(7, 0.07, 99), (20, 0.6, 33), (3, 0.1, 30)])
def test_denoise_is_the_tail_of_a_longer_schedule_of_literally_int_of_the_quotient(steps, denoise, total):
    whole = SPACE.sigmas("normal", total, 1.0)
    assert torch.equal(SPACE.sigmas("normal", steps, denoise), whole[-(steps + 1) :])


def test_denoise_above_0_9999_is_the_whole_schedule_and_zero_is_nothing():
    assert torch.equal(SPACE.sigmas("karras", 5, 0.99995), SPACE.sigmas("karras", 5, 1.0))
    assert len(SPACE.sigmas("karras", 5, 0.0)) == 0


def test_an_unknown_scheduler_is_named():
    with pytest.raises(UnsupportedError, match="'cosine'"):
        SPACE.sigmas("cosine", 5, 1.0)


def test_the_model_is_told_the_nearest_integer_time_by_logarithm():
    t = torch.tensor([0, 1, 500, 998, 999])
    sigmas = SPACE.sigma(t)
    assert torch.equal(SPACE.timestep(sigmas), t)
    log_between = 0.6 * math.log(TRAINING[500]) + 0.4 * math.log(TRAINING[501])
    between = torch.tensor(math.exp(log_between), dtype=torch.float32)
    assert SPACE.timestep(between) == 500
    assert SPACE.timestep(between).dtype == torch.int64
    assert SPACE.timestep(torch.tensor(100.0)) == 999


@pytest.mark.parametrize(
    ("name", "n"), [("normal", 5), ("normal", 19), ("sgm_uniform", 6), ("sgm_uniform", 20)]
)
def test_half_way_between_two_times_a_level_is_told_the_same_in_any_company(name, n):
    t = 999 - 999 * np.arange(n) / (n - 1 if name == "normal" else n)
    levels = SPACE.sigmas(name, n, 1.0)[:-1]
    told = SPACE.timestep(levels)
    assert any(t % 1 == 0.5)
    assert np.abs(told.numpy() - t).max() <= 0.5
    assert [int(SPACE.timestep(level)) for level in levels] == told.tolist()
    assert SPACE.timestep(levels.repeat(7)).tolist() == told.repeat(7).tolist()


def test_times_outside_the_table_are_its_ends():
    assert float(SPACE.sigma(torch.tensor(-5.0))) == pytest.approx(SPACE.sigma_min)
    assert float(SPACE.sigma(torch.tensor(2000.0))) == pytest.approx(SPACE.sigma_max)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_prediction_gives_back_the_clean_latent_row_by_row(prediction):
    space = DiscreteSpace(prediction)
    z0, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 14.0], dtype=torch.float64)
    x = space.noised(z0, noise, sigma)
    s = sigma.view(3, 1, 1, 1)
    # In the variance-preserving view x is alpha z0 + beta eps, and v = alpha eps - beta z0.
    alpha, beta = 1 / (1 + s**2) ** 0.5, s / (1 + s**2) ** 0.5
    out = noise if prediction == "epsilon" else alpha * noise - beta * z0
    torch.testing.assert_close(space.denoised(out, x, sigma), z0)
    torch.testing.assert_close(space.scale_input(x, sigma), alpha * z0 + beta * noise)


def test_only_a_full_schedule_starts_at_full_variance():
    z0, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    below = torch.tensor(2.0)
    assert SPACE.start(z0, noise, below)[0, 0, 0, 0] == 2
    top = SPACE.sigmas("normal", 5, 1.0)[0]
    assert top < SPACE.sigma_max  # by rounding only, and counts as full
    assert float(SPACE.start(z0, noise, top)[0, 0, 0, 0]) == pytest.approx(math.hypot(1, SPACE.sigma_max))
    assert float(SPACE.start(z0, noise, torch.tensor(20.0))[0, 0, 0, 0]) == pytest.approx(math.hypot(1, 20))
    assert torch.equal(SPACE.start(z0 + 3, noise, top), 3 + SPACE.start(z0, noise, top))


def test_a_share_of_the_schedule_is_a_share_of_training_time():
    assert SPACE.at_percent(0) == ALWAYS
    assert SPACE.at_percent(1) == 0
    assert SPACE.at_percent(0.5) == pytest.approx(float(_at(np.array(499.5))), rel=1e-5)
