"""Samplers in a trajectory: masks at each evaluation's own level, whose noise it is, how far it is."""

import pytest
import torch

from overpaint_shared.job import SAMPLERS as NAMES
from overpaint_shared.job import SCHEDULERS as SCHEDULE_NAMES
from overpaint_worker.engine.controls import Control
from overpaint_worker.engine.sampler import SAMPLERS
from overpaint_worker.engine.schedules import SCHEDULES
from overpaint_worker.engine.session import FEATURES
from overpaint_worker.engine.space import DiscreteSpace
from overpaint_worker.engine.trajectory import Noise, Trajectory
from tests.unit.test_loop import Model, text

SHAPE = (1, 4, 6, 5)
Z0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
HALF = torch.zeros(1, 1, 6, 5)
HALF[..., 2:] = 1
TWICE = ["dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "heun"]
PLAIN_NOISE = ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "lcm"]


def trajectory(name, seed=5, steps=4, **more):
    kind = SAMPLERS[name]
    sigmas = DiscreteSpace().sigmas("karras", steps, 0.7, drop_penultimate=kind.drop_penultimate)
    return Trajectory(
        job="j", model=Model(), sampler=kind, sigmas=sigmas, z0=Z0, seed=seed, positive=text(), negative=None,
        cfg=1.0, **more,
    )  # fmt: skip


def run(t, denoised=lambda row: row.x / (1 + row.sigma**2)):
    """All rows that were evaluated, and how far it had come before each."""
    rows, steps = [], []
    while t.want is not None:
        [row] = t.rows()
        rows.append(row)
        steps.append(t.step)
        t.advance(denoised(row))
    return rows, steps


def blend_of(name, seed):
    return Noise(seed + 1 if name == "ddim" else seed)(Z0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_mask_spares_has_the_noise_of_each_evaluations_own_level(name):
    rows, _ = run(trajectory(name, mask=HALF))
    for i, row in enumerate(rows):
        expected = Z0 + blend_of(name, 5) * row.sigma
        assert torch.equal(row.x[..., :2], expected[..., :2])
        start_is_blend = i == 0 and name != "ddim"
        assert torch.equal(row.x[..., 2:], expected[..., 2:]) == start_is_blend


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_mask_spares_comes_back(name):
    t = trajectory(name, mask=HALF)
    run(t)
    torch.testing.assert_close(t.result[..., :2], Z0[..., :2], atol=1e-5, rtol=0)
    assert float((t.result[..., 2:] - Z0[..., 2:]).abs().max()) > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_differential_mask_is_cut_anew_at_each_evaluations_own_time(name):
    t = trajectory(name, mask=torch.full((1, 1, 6, 5), 0.5), differential=True)
    space, ends = t.model.space, (t.sigmas[0], t.sigmas[-1].clamp_min(t.model.space.sigma_min))
    first, last = (int(space.timestep(sigma)) for sigma in ends)
    rows, _ = run(t)
    repainted = []
    for row in rows:
        known = Z0 + blend_of(name, 5) * row.sigma
        repainted.append(not torch.equal(row.x, known))
        share = (int(space.timestep(row.sigma)) - last) / (first - last)
        assert repainted[-1] == (share <= 0.5)
    assert set(repainted) == {False, True}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_controlnet_acts_by_each_evaluations_own_level(name):
    """Between two evaluations of one step it may begin or end: no step as a whole is in its range."""
    _, high, low, *_ = trajectory(name).sigmas.tolist()
    control = Control(
        net=None, hint=torch.zeros(1, 3, 48, 40), strength=1.0, first=high * 1.01, last=low * 1.01
    )
    rows, _ = run(trajectory(name, controls=[control]))
    acts = [row.controls == (control,) for row in rows]
    assert acts == [low * 1.01 <= float(row.sigma) <= high * 1.01 for row in rows]
    assert not acts[0]
    assert any(acts)
    assert not acts[-1]


@pytest.mark.parametrize("name", PLAIN_NOISE)
def test_the_first_noise_that_is_added_is_the_noise_of_the_start(name, monkeypatch):
    drawn, draw = [], Noise.__call__
    monkeypatch.setattr(Noise, "__call__", lambda noise, like: drawn.append(draw(noise, like)) or drawn[-1])
    run(trajectory(name))
    start, first, second, _ = drawn
    assert torch.equal(start, torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(first, start)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_is_all_that_noise_depends_on(name):
    ends = []
    for seed in (5, 5, 6):
        t = trajectory(name, seed=seed)
        torch.randn(7)
        run(t)
        ends.append(t.result)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_lcm_adds_the_noise_of_the_start_first():
    """Through the trajectory itself: with nothing denoised, the second latent is that noise at its level."""
    t = trajectory("lcm")
    rows, _ = run(t, denoised=lambda row: torch.zeros_like(row.x))
    assert torch.equal(rows[1].x, Noise(5)(Z0) * t.sigmas[1])
    assert not torch.equal(rows[2].x / t.sigmas[2], rows[1].x / t.sigmas[1])


@pytest.mark.parametrize(("seed", "next_seed"), [(5, 6), (2**32 - 1, 0), (2**64 - 1, 0), (2**40, 1)])
def test_ddim_blends_with_the_next_seeds_noise_which_wraps_at_32_bits(seed, next_seed):
    rows, _ = run(trajectory("ddim", seed=seed, mask=HALF))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(next_seed))
    assert torch.equal(rows[0].x[..., :2], (Z0 + noise * rows[0].sigma)[..., :2])


def test_without_a_mask_ddim_is_euler():
    euler, ddim = trajectory("euler"), trajectory("ddim")
    run(euler)
    run(ddim)
    assert torch.equal(euler.result, ddim.result)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_trajectory_says_how_many_steps_it_has_come_not_how_often_it_evaluated(name):
    t = trajectory(name)
    rows, steps = run(t)
    assert len(rows) == t.evaluations == (7 if name in TWICE else 4)
    assert steps[0] == 0
    assert sorted(steps) == steps
    assert set(steps) == {0, 1, 2, 3}
    assert t.step == t.steps == 4


def test_every_sampler_and_schedule_is_in_the_spec_and_announced():
    assert set(SAMPLERS) <= set(NAMES)
    assert set(SCHEDULES) == set(SCHEDULE_NAMES)
    assert {f"sampler:{name}" for name in SAMPLERS} <= FEATURES
    wanted = "heun dpm_2 dpm_2_ancestral dpmpp_2s_ancestral dpmpp_sde dpmpp_2m_sde ddim lcm"
    assert set(wanted.split()) <= set(SAMPLERS)
