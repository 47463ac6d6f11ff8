"""The step loop with a denoiser of one line: who shares a pass, who is first, what company changes."""

from types import SimpleNamespace

import pytest
import torch

from overpaint_shared.errors import OutOfMemory
from overpaint_worker.engine.families.conditioning import Conditioning
from overpaint_worker.engine.limits import FixedLimits, RowLimits
from overpaint_worker.engine.loop import Loop
from overpaint_worker.engine.rows import DETERMINISTIC_ROWS, BufferPool, Row, bucket_of
from overpaint_worker.engine.sampler import SAMPLERS
from overpaint_worker.engine.space import DiscreteSpace
from overpaint_worker.engine.trajectory import Noise, Trajectory

SHAPE = (1, 4, 6, 5)


class Model:
    """Denoises row by row: `x / (1 + sigma^2)` plus the mean of the row's text."""

    def __init__(self, name="m", fits=99):
        self.name = name
        self.space = DiscreteSpace()
        self.device = torch.device("cpu")
        self.passes = []
        self.buffers = set()
        self.fits = fits

    def denoise(self, x, sigma, conditioning, residuals, extra):
        if len(x) > self.fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        assert x.is_contiguous()
        assert len(x) == len(sigma) == len(conditioning["text"])
        text = conditioning["text"]
        self.passes.append(SimpleNamespace(rows=len(x), sigma=sigma.tolist(), text=text.clone()))
        self.buffers.add(x.data_ptr())
        text = text.mean((1, 2)).view(-1, 1, 1, 1)
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2) + text


def text(value=0.0, tokens=77):
    return Conditioning({"text": torch.full((1, tokens, 8), float(value))})


def job(name="a", model=None, *, steps=3, seed=1, cfg=7.0, shape=SHAPE, tokens=77, **more):
    model = model or Model()
    more.setdefault("sigmas", model.space.sigmas("normal", steps, 0.6))
    z0 = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000))
    return Trajectory(
        job=name, model=model, seed=seed, z0=more.pop("z0", z0),
        sampler=SAMPLERS[more.pop("sampler", "euler")],
        positive=text(0.5, tokens), negative=text(-0.5), cfg=cfg, **more,
    )  # fmt: skip


def drain(loop, *jobs):
    for j in jobs:
        loop.add(j)
    order = []
    while loop.live:
        turn = loop.turn()
        assert not turn.failed
        order.append("".join(j.job for j in turn.served))
    return order


def alone(**what):
    j = job(**what)
    drain(Loop(FixedLimits(16)), j)
    return j.result


# ----------------------------------------------------------------------------------------- sharing


def test_jobs_of_different_steps_seeds_and_guidance_share_passes_and_leave_when_they_are_done():
    model = Model()
    jobs = [job("a", model, steps=2), job("b", model, steps=4, seed=2), job("c", model, steps=3, cfg=1.0)]
    assert drain(Loop(FixedLimits(16)), *jobs) == ["abc", "abc", "bc", "b"]
    assert [p.rows for p in model.passes] == [8, 8, 4, 2]  # 5, 5, 3, 2 rows in their buckets
    assert [j.companies for j in jobs] == [{3: 2}, {3: 2, 2: 1, 1: 1}, {3: 2, 2: 1}]


def test_a_job_joins_at_the_next_turn():
    model = Model()
    loop = Loop(FixedLimits(16))
    loop.add(job("a", model, steps=4))
    loop.turn()
    loop.turn()
    assert drain(loop, job("b", model, steps=3)) == ["ab", "ab", "b"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_company_changes_no_bit_where_the_model_computes_row_by_row(sampler):
    model = Model()
    whats = [
        {"name": "a", "steps": 3, "seed": 1, "sampler": sampler},
        {"name": "b", "steps": 7, "seed": 2, "sampler": "euler", "cfg": 1.0},
        {"name": "c", "steps": 5, "seed": 3, "sampler": "dpmpp_2m", "cfg": 3.0},
        {"name": "d", "steps": 4, "seed": 4, "sampler": "euler_ancestral"},
    ]
    jobs = [job(model=model, **what) for what in whats]
    loop = Loop(FixedLimits(8))
    loop.add(jobs[0])
    loop.turn()
    drain(loop, *jobs[1:])
    for j, what in zip(jobs, whats, strict=True):
        assert torch.equal(j.result, alone(**what)), j.job


def test_what_cannot_share_a_pass_does_not():
    model = Model()
    loop = Loop(FixedLimits(16))
    a = job("a", model, steps=1)
    others = [
        job("m", Model("other"), steps=1),
        job("s", model, steps=1, shape=(1, 4, 6, 6)),
        job("x", model, steps=1, extra=torch.zeros(1, 5, 6, 5)),
        job("d", model, steps=1, deterministic=True),
    ]
    assert sorted(drain(loop, a, *others)) == sorted(["a", "m", "s", "x", "d"])


def test_jobs_whose_conditioning_differs_in_kind_do_not_meet():
    a, b = job("a"), job("b")
    b.model = a.model
    b.conditionings = [Conditioning({"text": torch.zeros(1, 77, 9)})] * 2
    assert a.key != b.key


def test_short_and_long_texts_meet_by_repetition_up_to_a_bound():
    model = Model()
    a, b = job("a", model, steps=1, tokens=77), job("b", model, steps=1, tokens=154)
    assert drain(Loop(FixedLimits(16)), a, b) == ["ab"]
    assert model.passes[0].text.shape[1] == 154
    assert (model.passes[0].text[1] == 0.5).all()  # a's positive, twice; padding with zeros would show
    c, d = job("c", model, steps=1, tokens=77 * 3), job("d", model, steps=1, tokens=77 * 4)
    assert drain(Loop(FixedLimits(16)), c, d) == ["c", "d"]  # 12 x 77 would be three times d's own length


def test_texts_that_would_meet_only_at_an_absurd_length_are_evaluated_one_by_one():
    model = Model()
    a, b = job("a", model, steps=1, tokens=77 * 127), job("b", model, steps=1)
    a.conditionings[0] = text(-0.5, 77 * 128)  # together they would have a million tokens
    assert sorted(drain(Loop(FixedLimits(16)), a, b)) == ["a", "b"]
    assert [p.text.shape[:2] for p in model.passes if p.rows == 1] == [(1, 77 * 128), (1, 77 * 127)]
    assert torch.allclose(a.result, alone(name="a", steps=1), atol=1e-6)


def test_rows_stand_negative_first_and_guidance_is_each_jobs_own():
    model = Model()
    a = job("a", model, steps=1, cfg=3.0)
    b = job("b", model, steps=1, cfg=1.0)
    drain(Loop(FixedLimits(16)), a, b)
    assert model.passes[0].text[:, 0, 0].tolist() == [-0.5, 0.5, 0.5, -0.5]  # a-, a+, b+, padding
    sigma = float(a.sigmas[0])
    x = a.model.space.start(a.z0, a.noise, a.sigmas[0])
    torch.testing.assert_close(a.result, x / (1 + sigma**2) + (-0.5 + (0.5 - -0.5) * 3.0))
    torch.testing.assert_close(
        b.result, b.model.space.start(b.z0, b.noise, b.sigmas[0]) / (1 + sigma**2) + 0.5
    )


def test_each_row_has_its_own_noise_level():
    model = Model()
    a, b = job("a", model, steps=2), job("b", model, steps=5)
    drain(Loop(FixedLimits(16)), a, b)
    assert model.passes[0].sigma == [float(a.sigmas[0])] * 2 + [float(b.sigmas[0])] * 2
    assert a.sigmas[0] != b.sigmas[0]


# --------------------------------------------------------------------------------------- fairness


def test_limits_count_rows():
    model = Model()
    jobs = [job("a", model, steps=1), job("b", model, steps=1), job("c", model, steps=1, cfg=1.0)]
    assert drain(Loop(FixedLimits(4)), *jobs) == ["ab", "c"]
    jobs = [job("a", model, steps=1), job("b", model, steps=1, cfg=1.0), job("c", model, steps=1, cfg=1.0)]
    assert drain(Loop(FixedLimits(4)), *jobs) == ["abc"]


def test_whoever_was_served_longest_ago_goes_first_so_that_no_group_starves():
    one, two = Model("one"), Model("two")
    jobs = [job(n, one, steps=3, seed=i) for i, n in enumerate("abcd")] + [job("z", two, steps=3)]
    order = drain(Loop(FixedLimits(4)), *jobs)
    assert order == ["ab", "cd", "z"] * 3


def test_a_job_of_more_rows_than_the_limit_is_evaluated_in_parts_and_comes_out_the_same():
    model = Model()
    a = job("a", model)
    drain(Loop(FixedLimits(1)), a)
    assert {p.rows for p in model.passes} == {1}
    assert torch.equal(a.result, alone())


# ---------------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (16, 16)])
def test_rows_are_padded_to_the_next_bucket(rows, bucket):
    assert bucket_of(rows) == bucket


def test_more_rows_than_the_largest_bucket_are_refused():
    with pytest.raises(ValueError, match="17 rows"):
        bucket_of(17)


def test_passes_of_one_shape_use_the_same_buffers():
    model = Model()
    drain(Loop(FixedLimits(16)), job("a", model, steps=6))
    assert len(model.buffers) == 1


def test_padding_repeats_a_real_row():
    row = Row(torch.full((1, 4, 2, 2), 3.0), torch.tensor(2.0), text(0.25), torch.full((1, 5, 2, 2), 7.0))
    buffers = BufferPool().get([row], 4)
    for i in range(4):
        assert (buffers.x[i] == 3).all()
        assert buffers.sigma[i] == 2
        assert (buffers.extra[i] == 7).all()
        assert (buffers.conditioning["text"][i] == 0.25).all()


def test_a_text_is_copied_where_another_job_takes_the_row_and_not_while_one_stays():
    pool, (one, two, three) = BufferPool(), (text(value) for value in (1, 2, 3))

    def seen(*texts):
        rows = [Row(torch.zeros(SHAPE), torch.tensor(1.0), each) for each in texts]
        return pool.get(rows, 4).conditioning["text"]

    assert seen(one, two)[:, 0, 0].tolist() == [1, 2, 1, 1]
    assert seen(two, three)[:, 0, 0].tolist() == [2, 3, 2, 2]
    buffer = seen(one, two, three)
    assert buffer[:, 0, 0].tolist() == [1, 2, 3, 1]
    buffer[2] = 9
    assert seen(one, two, three)[:, 0, 0].tolist() == [1, 2, 9, 1]
    assert seen(one, two, one)[:, 0, 0].tolist() == [1, 2, 1, 1]


def test_only_so_many_buffers_are_kept():
    pool = BufferPool(kept=2)
    for side in (2, 3, 4, 5):
        pool.get([Row(torch.zeros(1, 4, side, side), torch.tensor(1.0), text())], 1)
    assert len(pool._pool) == 2


# ------------------------------------------------------------------------------------ masks and noise


def test_the_first_ancestral_noise_equals_the_start_noise_and_only_32_bits_of_a_seed_count():
    like = torch.zeros(SHAPE)
    assert torch.equal(Noise(5)(like), torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(Noise(5 + 2**32)(like), Noise(5)(like))
    assert torch.equal(Noise(2**64 - 1)(like), Noise(2**32 - 1)(like))
    a = job("a", sampler="euler_ancestral", seed=9, steps=2)
    assert torch.equal(a.noise, Noise(9)(like))
    x, sigmas = a.want.x, a.sigmas
    d = x / (1 + sigmas[0] ** 2)
    a.advance(torch.cat([d, d]))
    up = sigmas[1] * (1 - (sigmas[1] / sigmas[0]) ** 2) ** 0.5
    down = sigmas[1] ** 2 / sigmas[0]
    torch.testing.assert_close((a.want.x - (x + (x - d) / sigmas[0] * (down - sigmas[0]))) / up, a.noise)


def test_outside_the_mask_the_latent_ends_as_it_was_and_the_model_sees_it_noised_to_each_level():
    seen = []

    class Watching(Model):
        def denoise(self, x, sigma, conditioning, residuals, extra):
            seen.append((x[0].clone(), float(sigma[0])))
            return super().denoise(x, sigma, conditioning, residuals, extra)

    mask = torch.zeros(1, 1, 6, 5)
    mask[..., 2:4, 1:3] = 1
    mask[..., 4, 4] = 0.5
    a = job("a", Watching(), steps=4, mask=mask)
    drain(Loop(FixedLimits(16)), a)
    assert torch.equal(a.result[:, :, 0], a.z0[:, :, 0])
    assert not torch.equal(a.result[:, :, 2, 1], a.z0[:, :, 2, 1])
    assert len(seen) == 4
    for x, sigma in seen:
        torch.testing.assert_close(x[:, 0], (a.z0 + a.noise * sigma)[0, :, 0])


def test_a_soft_mask_mixes_the_known_latent_with_the_new_one():
    whole, half = job("a", steps=1), job("a", steps=1, mask=torch.full((1, 1, 6, 5), 0.5))
    sigma = whole.sigmas[0]
    x = whole.model.space.start(whole.z0, whole.noise, sigma)
    entered = x * 0.5 + (whole.z0 + whole.noise * sigma) * 0.5
    d = entered / (1 + sigma**2) + 6.5  # -0.5 + 7 * 1.0
    drain(Loop(FixedLimits(16)), half)
    torch.testing.assert_close(half.result, d * 0.5 + half.z0 * 0.5)


def test_differential_repaints_each_cell_from_the_time_on_that_its_mask_stands_for():
    mask = torch.linspace(0, 1, 5).expand(1, 1, 6, 5).contiguous()
    a = job("a", steps=8, mask=mask, differential=True)
    loop = Loop(FixedLimits(16))
    loop.add(a)
    shares = []
    while loop.live:
        shares.append(float(a._mask.mean()))
        assert set(a._mask.unique().tolist()) <= {0.0, 1.0}
        loop.turn()
    assert shares[0] == pytest.approx(0.2)  # at first only where the mask is 1
    assert shares == sorted(shares)
    t = a.model.space.timestep
    end = t(torch.tensor(a.model.space.sigma_min))
    third = float((t(a.sigmas[3]) - end) / (t(a.sigmas[0]) - end))
    assert shares[3] == pytest.approx(float((mask >= third).float().mean()))


def test_no_steps_leave_the_latent_as_it_is():
    a = job("a", sigmas=torch.zeros(0))
    assert a.want is None
    assert torch.equal(a.result, a.z0)


# --------------------------------------------------------------------------------- what goes wrong


def test_when_memory_runs_out_the_pass_is_split_and_every_job_still_comes_out_the_same():
    model = Model(fits=2)
    jobs = [job(n, model, seed=i) for i, n in enumerate("abc")]
    loop = Loop(RowLimits(first=8))
    drain(loop, *jobs)
    assert {p.rows for p in model.passes} == {2}
    assert loop.limits.rows(jobs[0].curve) == 2
    for i, j in enumerate(jobs):
        assert torch.equal(j.result, alone(seed=i))
        assert any("memory ran out" in note for note in j.adjustments)


def test_when_memory_is_too_small_for_one_row_the_job_says_so_and_the_others_go_on():
    small, large = Model("small", fits=0), Model("large")
    loop = Loop(FixedLimits(16))
    a, b = job("a", small), job("b", large)
    loop.add(a)
    loop.add(b)
    failed = []
    while loop.live:
        failed += loop.turn().failed
    assert [(j.job, type(e)) for j, e in failed] == [("a", OutOfMemory)]
    assert torch.equal(b.result, alone())


def test_one_jobs_error_in_a_shared_pass_fails_that_job_alone():
    class Picky(Model):
        def denoise(self, x, sigma, conditioning, residuals, extra):
            if not torch.isfinite(x).all():
                raise ValueError("not finite")
            return super().denoise(x, sigma, conditioning, residuals, extra)

    model = Picky()
    loop = Loop(FixedLimits(16))
    good, bad = job("a", model), job("b", model, z0=torch.full(SHAPE, float("nan")))
    loop.add(good)
    loop.add(bad)
    failed = []
    while loop.live:
        failed += loop.turn().failed
    assert [j.job for j, _ in failed] == ["b"]
    assert torch.equal(good.result, alone())


def test_a_cancelled_job_leaves_between_turns_and_the_rest_is_untouched():
    model = Model()
    loop = Loop(FixedLimits(16))
    a, b = job("a", model), job("b", model, seed=2)
    loop.add(a)
    loop.add(b)
    loop.turn()
    loop.remove(a)
    assert drain(loop) == ["b", "b"]
    assert torch.equal(b.result, alone(seed=2))


def test_deterministic_jobs_are_always_evaluated_in_the_same_bucket_and_among_their_like():
    model = Model()
    a = job("a", model, deterministic=True)
    plain = [job(n, model, seed=i) for i, n in enumerate("xyz")]
    order = drain(Loop(FixedLimits(16)), a, *plain)
    assert order == ["a", "xyz"] * 3
    b, c, d = (job(n, model, steps=1, seed=i, deterministic=True) for i, n in enumerate("bcd"))
    model.passes.clear()
    drain(Loop(FixedLimits(2)), b, c, d)
    assert [p.rows for p in model.passes] == [DETERMINISTIC_ROWS] * 2


# --------------------------------------------------------------------------------- learning the limit


def learn(per_row, turns=60, waiting=True, **how):
    """Feed passes of the current limit whose rows cost `per_row(bucket)` seconds; where the limit ends up."""
    limits = RowLimits(**how)
    for _ in range(turns):
        bucket = limits.rows("k")
        limits.record("k", bucket, per_row(bucket) * bucket, more_waiting=waiting)
    return limits.rows("k")


def test_the_limit_grows_to_the_knee_of_the_speed_curve():
    assert learn(lambda rows: 1 / rows + 0.25 * (rows > 4)) == 4  # beyond 4 a row hardly gets cheaper
    assert learn(lambda rows: 1 / rows) == 16
    assert learn(lambda _: 1.0) == 2  # more rows gain nothing: stay with one job


def test_the_limit_does_not_grow_while_nothing_waits():
    assert learn(lambda rows: 1 / rows, waiting=False) == 2


def test_the_limit_never_exceeds_its_ceiling_and_halves_for_good_when_memory_runs_out():
    assert learn(lambda rows: 1 / rows, ceiling=8) == 8
    limits = RowLimits(first=16)
    limits.out_of_memory("k", 16)
    assert limits.rows("k") == 8
    for _ in range(50):
        limits.record("k", 8, 1.0, more_waiting=True)
    assert limits.rows("k") == 8
    assert limits.rows("other") == 16


def test_a_slow_first_pass_of_a_bucket_is_not_held_against_it():
    seen = set()

    def per_row(rows):
        first = rows not in seen
        seen.add(rows)
        return 100.0 if first else 1 / rows

    assert learn(per_row) == 16


def test_the_largest_limit_in_use_is_told():
    limits = RowLimits()
    assert limits.largest() == 2
    for _ in range(10):
        limits.record("k", limits.rows("k"), 1.0, more_waiting=True)
    assert limits.largest() == limits.rows("k") > 2
