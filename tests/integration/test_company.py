"""The same picture, whatever the company: jobs of different steps, seeds, prompts and denoise."""

import json

import numpy as np
import pytest

from tests.rendering import img2img, kitchen, pixels, render, request

JOBS = {
    "a": img2img("a red brick house", steps=12),
    "b": img2img(
        "a cat on a chair " * 20, seed=7, steps=16, denoise=0.35, sampler="dpmpp_2m", scheduler="karras"
    ),
    "c": img2img("", seed=2**63, steps=10, denoise=1.0, sampler="euler_ancestral", scheduler="simple"),
    "d": img2img("the sea", seed=3, steps=14, cfg=1.0, denoise=0.8, scheduler="sgm_uniform"),
}


def picture(done):
    assert hasattr(done, "files"), done
    return pixels(done.files["image.png"])


def receipt(done):
    return json.loads(done.files["receipt.json"])


@pytest.fixture(scope="module")
def alone(tiny_registry):
    return {name: render(tiny_registry, [request(name, spec)])[name] for name, spec in JOBS.items()}


@pytest.fixture(scope="module")
def together(tiny_registry):
    return render(tiny_registry, [request(name, spec) for name, spec in JOBS.items()])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_among_three_others_is_within_one_level_of_itself_alone(name, alone, together):
    off = np.abs(picture(alone[name]) - picture(together[name]))
    print(f"{name}: largest difference {off.max()}, {np.mean(off > 0):.3%} of values differ")
    assert off.max() <= 1


def test_the_jobs_did_share_passes_and_differ(together):
    for name in JOBS:
        assert max(map(int, receipt(together[name])["evaluations"]["by_company"])) == 4
    assert np.abs(picture(together["a"]) - picture(together["c"])).max() > 10


def test_a_deterministic_job_has_the_same_bits_alone_and_in_company(tiny_registry):
    spec = img2img(steps=10, deterministic=True)
    others = [
        request("x", img2img("another", seed=5, steps=12, deterministic=True)),
        request("y", img2img("a third", seed=6, steps=9, denoise=0.9, deterministic=True)),
        request("z", JOBS["b"]),
    ]
    by_itself = render(tiny_registry, [request("a", spec)])["a"]
    first = render(tiny_registry, [request("a", spec), *others])["a"]
    last = render(tiny_registry, [*others, request("a", spec)])["a"]
    assert max(map(int, receipt(first)["evaluations"]["by_company"])) == 2
    assert np.array_equal(picture(by_itself), picture(first))
    assert np.array_equal(picture(by_itself), picture(last))


def test_a_job_that_must_run_alone_waits_for_the_others_and_lets_none_in(tiny_registry):
    k = kitchen(tiny_registry)
    for name in ("first", "single", "last"):
        k.conductor.submit(request(name, img2img(steps=2), alone=name == "single"))
    k.conductor.run_until_idle()
    order = [name for name, end in k.ends().items() if hasattr(end, "files")]
    assert order == ["first", "single", "last"]
    single = receipt(k.ends()["single"])["evaluations"]
    assert single["alone"]
    assert single["by_company"] == {"1": 2}
    told = [m for m in k.said if type(m).__name__ == "Progress" and m.stage == "prepare"]
    begun = [m.job for m in told if m.step == 0]
    ended = [m.job for m in k.said if type(m).__name__ == "Done"]
    assert begun == ["first", "single", "last"]
    assert [m.job for m in told if m.step == m.of] == begun, "each stage on a CPU thread tells its end, too"
    assert k.said.index(k.ends()["first"]) < _began(k, "single")
    assert k.said.index(k.ends()["single"]) < _began(k, "last")
    assert ended == order


def _began(k, job):
    return next(i for i, m in enumerate(k.said) if type(m).__name__ == "Progress" and m.job == job)
