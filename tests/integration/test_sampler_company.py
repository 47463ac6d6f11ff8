"""Every sampler through a whole session: alone, and in one batch with all the others."""

import json

import numpy as np
import pytest

from overpaint_worker import protocol as p
from overpaint_worker.engine import conductor
from overpaint_worker.engine.sampler import SAMPLERS
from overpaint_worker.engine.schedules import SCHEDULES
from tests.rendering import INPUTS, img2img, kitchen, pixels, render, request

MASKED = {"mask": {"from": "image", "image": "mask64.png"}, "method": {"kind": "latent_noise_mask"}}
SCHEDULE_OF = dict(zip(SAMPLERS, [*SCHEDULES, "karras", "normal"], strict=True))


def spec(name):
    """Every second one with a mask, every third without guidance; all schedules occur."""
    i = list(SAMPLERS).index(name)
    job = img2img(
        seed=i + 2**33, steps=5 + i % 3, sampler=name, scheduler=SCHEDULE_OF[name],
        cfg=1.0 if i % 3 == 0 else 6.0, denoise=0.7,
    )  # fmt: skip
    return {**job, **MASKED} if i % 2 else job


@pytest.fixture(scope="module")
def alone(tiny_registry):
    return {name: render(tiny_registry, [request(name, spec(name))])[name] for name in SAMPLERS}


@pytest.fixture(scope="module")
def together(tiny_registry):
    return render(tiny_registry, [request(name, spec(name)) for name in SAMPLERS])


def picture(done):
    assert hasattr(done, "files"), done
    return pixels(done.files["image.png"])


def receipt(done):
    return json.loads(done.files["receipt.json"])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_in_mixed_company_is_within_one_level_of_itself_alone(name, alone, together):
    off = np.abs(picture(alone[name]) - picture(together[name]))
    assert off.max() <= 1
    assert max(map(int, receipt(together[name])["evaluations"]["by_company"])) > 3
    assert list(receipt(alone[name])["evaluations"]["by_company"]) == ["1"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_repaints_and_spares_what_the_mask_spares(name, alone):
    before = pixels((INPUTS / "img64.png").read_bytes())[..., :3]
    after = picture(alone[name])[..., :3]
    changed = np.abs(after - before).max(-1)
    assert changed.max() > 20
    if "mask" in spec(name):
        mask = pixels((INPUTS / "mask64.png").read_bytes())
        assert mask.shape == before.shape[:2]
        assert 0 < np.mean(mask == 0) < 1
        assert changed[mask == 0].max() == 0


def test_samplers_of_one_seed_and_schedule_give_different_pictures(tiny_registry):
    jobs = {name: img2img(steps=4, sampler=name, denoise=0.9) for name in SAMPLERS}
    done = render(tiny_registry, [request(name, job) for name, job in jobs.items()])
    for name in SAMPLERS:
        same = {other for other in SAMPLERS if np.abs(picture(done[name]) - picture(done[other])).max() <= 1}
        assert same == ({"euler", "ddim"} if name in ("euler", "ddim") else {name})


def test_the_evaluations_of_a_receipt_are_those_made_and_progress_counts_steps(tiny_registry, monkeypatch):
    monkeypatch.setattr(conductor, "REPEAT_S", 0.0)  # every turn is told
    k = kitchen(tiny_registry)
    k.conductor.submit(request("j", img2img(steps=3, sampler="heun")))
    k.conductor.run_until_idle()
    assert receipt(k.ends()["j"])["evaluations"]["count"] == 5
    told = [(m.step, m.of) for m in k.said if isinstance(m, p.Progress) and m.stage == "denoise"]
    assert told == [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (3, 3)]
