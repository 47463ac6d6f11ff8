"""The noise of stochastic samplers: a Brownian path over sigma."""

import warnings
from itertools import pairwise

import pytest
import torch
import torchsde

from overpaint_worker.engine.sampler.brownian import BrownianPath
from overpaint_worker.engine.space import DiscreteSpace
from overpaint_worker.engine.trajectory import Noise

LIKE = torch.zeros(1, 4, 8, 8)
SIGMAS = DiscreteSpace().sigmas("karras", 6, 1.0)


def path(seed=3, like=LIKE):
    return Noise(seed).path(like, SIGMAS)


def test_the_noise_of_a_step_is_the_trees_increment_towards_the_target():
    tree = torchsde.BrownianTree(t0=SIGMAS[-2], w0=torch.zeros(1, 4, 8, 8), t1=SIGMAS[0], entropy=2**40 + 3)
    noise = path(seed=2**40 + 3)
    a, b = SIGMAS[2], SIGMAS[3]
    assert torch.equal(noise(a, b), -tree(b, a) / (a - b).sqrt())
    assert torch.equal(noise(b, a), -noise(a, b))


def test_parts_of_a_step_add_up_to_the_whole():
    noise = path()
    a, m, b = SIGMAS[1], (SIGMAS[1] * SIGMAS[2]).sqrt(), SIGMAS[2]
    parts = noise(a, m) * (a - m).sqrt() + noise(m, b) * (m - b).sqrt()
    torch.testing.assert_close(parts, noise(a, b) * (a - b).sqrt(), atol=1e-5, rtol=1e-5)


def test_noise_does_not_depend_on_what_was_asked_before_nor_on_other_paths():
    first, second, other = path(), path(), path(seed=4)
    steps = list(pairwise(SIGMAS[:-1]))
    forwards = [first(a, b) for a, b in steps]
    for a, b in reversed(steps):
        other(a, b)
        torch.randn(5)
        assert torch.equal(second(a, b), forwards.pop())


def test_all_bits_of_a_seed_count():
    a, b = SIGMAS[0], SIGMAS[1]
    ends = [path(seed)(a, b) for seed in (3, 4, 3 + 2**32, 3 + 2**63)]
    assert len({float(end.sum()) for end in ends}) == 4


def test_increments_are_standard_normal_and_independent():
    noise = path(like=torch.zeros(1, 4, 64, 64))
    drawn = torch.stack([noise(a, b).flatten() for a, b in pairwise(SIGMAS[:-1])])
    torch.testing.assert_close(drawn.mean(1), torch.zeros(5), atol=0.04, rtol=0)
    torch.testing.assert_close(torch.corrcoef(drawn), torch.eye(5), atol=0.04, rtol=0)
    torch.testing.assert_close(drawn.std(1), torch.ones(5), atol=0.03, rtol=0)


@pytest.mark.parametrize("scheduler", ["karras", "normal", "exponential", "beta"])
def test_the_ends_of_the_path_are_asked_without_a_warning(scheduler):
    sigmas = DiscreteSpace().sigmas(scheduler, 4, 1.0)
    noise = Noise(1).path(LIKE, sigmas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(noise(sigmas[0], sigmas[-2])).all()


def test_noise_has_the_shape_and_type_of_the_latent():
    wide = torch.zeros(1, 4, 3, 9, dtype=torch.float64)
    noise = BrownianPath(wide, SIGMAS[-2], SIGMAS[0], 1)(SIGMAS[0], SIGMAS[1])
    assert noise.shape == wide.shape
    assert noise.dtype == torch.float64


def test_a_schedule_of_one_level_has_a_path_that_nobody_asks():
    Noise(1).path(LIKE, torch.tensor([3.0, 0.0]))
