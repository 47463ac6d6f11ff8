"""One job through the engine: its files, its receipt, its stages, and what can be wrong with it."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from overpaint_shared.errors import OverpaintError
from overpaint_worker import protocol as p
from overpaint_worker.engine import time_limit
from overpaint_worker.engine.families.sd import SdModel
from overpaint_worker.engine.trajectory import Trajectory
from tests.rendering import DEVICE, INPUTS, house, img2img, kitchen, pixels, render, request

STAGES = ["prepare", "load", "condition", "encode", "denoise", "decode", "store"]


def one(registry, spec, inputs=None):
    return render(registry, [request("j", spec, inputs)])["j"]


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def told(tiny_registry):
    """All that is said while one job renders."""
    k = kitchen(tiny_registry)
    k.conductor.submit(request("j", img2img(steps=3)))
    k.conductor.run_until_idle()
    return k


def test_a_job_goes_through_its_stages_in_order(told):
    stages = [m.stage for m in told.said if isinstance(m, p.Progress)]
    assert list(dict.fromkeys(stages)) == STAGES
    steps = [(m.step, m.of) for m in told.said if isinstance(m, p.Progress) and m.stage == "denoise"]
    assert steps[0] == (0, 3)
    assert (1, 3) in steps
    assert steps[-1] == (3, 3)


def test_each_unit_of_work_is_announced_with_a_budget_and_its_jobs(told):
    units = [m for m in told.said if isinstance(m, p.Unit)]
    assert {u.stage for u in units} == {"idle", "load", "condition", "encode", "denoise", "decode"}
    for unit in units:
        assert (unit.budget_s > 0) == (unit.stage != "idle")
        assert unit.jobs == ([] if unit.stage == "idle" else ["j"])


def test_the_receipt_says_what_made_the_picture(told):
    done = told.ends()["j"]
    receipt = json.loads(done.files["receipt.json"])
    assert receipt["spec"]["sampling"]["sampler"] == "euler"
    assert receipt["spec"]["compat"] == "none"  # a default, written out
    data = (INPUTS / "img64.png").read_bytes()
    assert receipt["inputs"]["img64.png"] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert len(receipt["model"]["sha256"]) == 64
    assert receipt["device"] == {
        "device": str(DEVICE),
        "name": receipt["device"]["name"],
        "dtype": "float32",
        "threads": 1,
    }
    assert {"overpaint", "torch", "diffusers", "transformers"} <= receipt["versions"].keys()
    assert set(STAGES) < set(receipt["seconds"])
    assert receipt["evaluations"] == {"count": 3, "rows_each": 2, "alone": False, "by_company": {"1": 3}}
    assert receipt["adjustments"] == []
    assert len(receipt["sigmas"]) == 4
    assert done.summary["seed"] == 42


def test_defaults_and_a_seed_are_filled_in_and_stand_in_the_receipt(tiny_registry):
    spec = {"version": 1, "model": "tiny", "source": {"image": "img64.png"}, "method": {"kind": "img2img"}}
    first, second = one(tiny_registry, spec), one(tiny_registry, spec)
    sampling = json.loads(first.files["receipt.json"])["spec"]["sampling"]
    assert (sampling["steps"], sampling["cfg"], sampling["denoise"]) == (4, 7.0, 0.6)
    assert sampling["seed"] != json.loads(second.files["receipt.json"])["spec"]["sampling"]["seed"]
    again = one(tiny_registry, {**spec, "sampling": {"seed": sampling["seed"]}})
    assert np.array_equal(pixels(again.files["image.png"]), pixels(first.files["image.png"]))


def test_with_a_mask_nothing_changes_outside_it_bit_for_bit(tiny_registry):
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 20:50] = 255
    spec = {**img2img(), "mask": {"from": "image", "image": "m.png"}, "preserve": {"max_outside": 0}}
    source = (INPUTS / "img64.png").read_bytes()
    done = one(tiny_registry, spec, {"img64.png": source, "m.png": png(mask)})
    assert isinstance(done, p.Done), done
    out, before = pixels(done.files["image.png"])[..., :3], pixels(source)[..., :3]
    assert np.array_equal(out[mask == 0], before[mask == 0])
    assert not np.array_equal(out[mask == 255], before[mask == 255])
    assert np.array_equal(pixels(done.files["mask.png"])[..., 0], mask)
    receipt = json.loads(done.files["receipt.json"])
    assert receipt["certificate"]["outside"] == {"largest_change": 0, "changed_share": 0.0}


def test_preserve_fails_a_job_that_changes_what_the_mask_spares(tiny_registry):
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    spec = {
        **img2img(), "composite": False,
        "mask": {"from": "image", "image": "m.png"}, "preserve": {"max_outside": 3},
    }  # fmt: skip
    failed = one(tiny_registry, spec, {"img64.png": (INPUTS / "img64.png").read_bytes(), "m.png": png(mask)})
    assert failed.kind == "job"
    assert failed.error["field"] == "preserve.max_outside"


@pytest.mark.parametrize("size", [(64, 64), (61, 75), (9, 5)], ids=["multiples of 8", "odd sides", "tiny"])
def test_the_result_has_the_canvas_size(tiny_registry, size):
    height, width = size
    picture = png(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))
    done = one(tiny_registry, img2img(image="p.png", steps=1), {"p.png": picture})
    assert pixels(done.files["image.png"]).shape == (height, width, 3)


def test_the_reference_crops_odd_sides_and_so_do_we_under_compat(tiny_registry):
    done = one(tiny_registry, {**img2img(image="img_odd.png", steps=1), "compat": "comfyui"})
    height, width = pixels((INPUTS / "img_odd.png").read_bytes()).shape[:2]
    assert pixels(done.files["image.png"]).shape == (height // 8 * 8, width // 8 * 8, 3)


WRONG = {
    "a picture that is none": (img2img(), {"img64.png": b"<html>no</html>"}, "job", "input", "source.image"),
    "a picture cut short": (
        img2img(), {"img64.png": (INPUTS / "img64.png").read_bytes()[:400]}, "job", "input", "source.image",
    ),
    "a picture that was not sent": (img2img(), {}, "job", "input", "source.image"),
    "too many steps": (img2img(steps=5000), None, "job", "job", "sampling.steps"),
    "a model that is not here": ({**img2img(), "model": "sdxl"}, None, "unable", "unsupported", "model"),
    "a feature of a later version": (img2img(guidance=3.5), None, "unable", "unsupported", None),
    "a method for other models": (
        {**img2img(), "mask": {"from": "image", "image": "mask64.png"}, "method": {"kind": "inpaint_model"}},
        None, "job", "job", "method.kind",
    ),
    "a sampler of a later version": (img2img(sampler="deis"), None, "unable", "unsupported", None),
    "a mask so thin that it vanishes": (
        {
            **img2img(), "mask": {"from": "image", "image": "thin.png"},
            "method": {"kind": "latent_noise_mask"},
        },
        "thin", "job", "mask", "mask",
    ),
    "a spec that is none": ({"version": 1}, None, "job", "spec", "model"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_job_fails_by_itself_with_a_typed_error(tiny_registry, what):
    spec, inputs, kind, code, field = WRONG[what]
    if inputs == "thin":
        thin = np.zeros((64, 64), np.uint8)
        thin[8] = 255
        inputs = {"img64.png": (INPUTS / "img64.png").read_bytes(), "thin.png": png(thin)}
    ends = render(tiny_registry, [request("good", img2img(steps=2)), request("bad", spec, inputs)])
    assert isinstance(ends["good"], p.Done)
    bad = ends["bad"]
    assert isinstance(bad, p.Failed)
    error = OverpaintError.from_json(bad.error)
    assert (bad.kind, error.code) == (kind, code)
    assert field is None or error.field == field


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_is_read_before_the_device_is_asked_for_anything(tiny_registry, field):
    k = kitchen(tiny_registry)
    k.conductor.submit(request("j", {**img2img(), field: "(" * 200 + "a" + ")" * 200}))
    k.conductor.run_until_idle()
    failed = k.ends()["j"]
    assert (failed.kind, failed.error["code"]) == ("job", "job")
    assert "64 deep" in failed.error["message"]
    assert failed.error["field"] == field
    assert {m.stage for m in k.said if isinstance(m, p.Progress)} == {"prepare"}


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_too_many_tokens_are_told_by_the_field_that_has_them(tiny_registry, field):
    k = kitchen(tiny_registry)
    k.conductor.submit(request("j", {**img2img(), field: "a " * 9_700}))
    k.conductor.run_until_idle()
    error = k.ends()["j"].error
    assert (error["code"], error["field"]) == ("job", field)
    assert "tokens" in error["message"]


def test_a_bug_met_by_one_job_fails_that_job_only(tiny_registry, monkeypatch):
    whole = Trajectory.advance

    def buggy(self, denoised, company=1):
        if self.job == "bad":
            raise ZeroDivisionError("a bug")
        return whole(self, denoised, company)

    monkeypatch.setattr(Trajectory, "advance", buggy)
    ends = render(tiny_registry, [request("good", img2img(steps=2)), request("bad", img2img(steps=2))])
    assert isinstance(ends["good"], p.Done)
    assert ends["bad"].kind == "job"
    assert "ZeroDivisionError" in ends["bad"].error["message"]


@pytest.mark.parametrize("stage", ["prepare", "condition", "encode", "denoise", "decode", "store"])
def test_a_job_cancelled_at_any_stage_leaves_and_its_neighbour_does_not_notice(tiny_registry, stage):
    k = kitchen(tiny_registry)
    heard = k.conductor._emit

    def cancel_at(message):
        heard(message)
        if isinstance(message, p.Progress) and (message.job, message.stage) == ("gone", stage):
            k.conductor.cancel("gone", 1)

    k.conductor._emit = cancel_at
    k.conductor.submit(request("gone", img2img(steps=9)))
    k.conductor.submit(request("stays", img2img(steps=2)))
    k.conductor.run_until_idle()
    ends = k.ends()
    assert isinstance(ends["gone"], p.Cancelled)
    assert isinstance(ends["stays"], p.Done)
    last = k.said.index(ends["gone"])
    assert not [m for m in k.said[last + 1 :] if getattr(m, "job", None) == "gone"]
    assert not [m for m in k.said[last + 1 :] if isinstance(m, p.Unit) and "gone" in m.jobs]


@pytest.mark.parametrize(
    ("dtype", "words"), [("float16", '"bfloat16" or "float32"'), ("float32", "lower `cfg`")]
)
def test_a_job_whose_steps_leave_the_numbers_fails_alone_and_is_told_why(
    tiny_registry, monkeypatch, dtype, words
):
    whole = SdModel.denoise

    def overflowing(self, x, *rest, **more):
        """As float16 does: the larger of two pictures is too much."""
        denoised = whole(self, x, *rest, **more)
        return denoised * float("inf") if x.shape[-1] > 8 else denoised

    monkeypatch.setattr(SdModel, "denoise", overflowing)
    jobs = [request("large", img2img(image="img256.png", steps=2)), request("small", img2img(steps=2))]
    ends = render(tiny_registry, jobs, dtype=dtype)
    assert isinstance(ends["small"], p.Done), ends["small"]
    failed = ends["large"]
    assert (failed.kind, failed.error["code"], failed.error["field"]) == ("job", "precision", "model")
    assert words in failed.error["fix"]
    store = house(tiny_registry, dtype).models
    assert store.get("tiny")._vae._vae.dtype == getattr(torch, dtype), "the VAE is not to blame"


def test_jobs_whose_pictures_and_masks_take_too_long_fail_and_the_engine_goes_on(tiny_registry, monkeypatch):
    """All of these are within the job spec's limits."""
    small = [request("small", img2img(steps=1))]
    render(tiny_registry, small)  # what is imported and loaded at first is no work of a job's
    monkeypatch.setattr(time_limit, "WALL_S", 1.0)
    monkeypatch.setattr(time_limit, "COMPUTED_S", 0.4)
    there_and_back = [{"op": "scale", "width": w, "height": w, "filter": "lanczos"} for w in (2048, 2047)]
    blurred = {"from": "pad", "ops": [{"op": "blur", "radius": 500}] * 32}
    asked = {
        "prepare": {"prepare": [*there_and_back * 15, {"op": "scale", "width": 64, "height": 64}]},
        "mask": {
            "prepare": [{"op": "pad", "right": 960, "bottom": 960}],
            "mask": {"from": "combine", "how": "union", "masks": [blurred] * 8},
            "method": {"kind": "latent_noise_mask"},
        },
        "finish": {"finish": there_and_back * 8},
    }
    jobs = [request(field, {**img2img(steps=1), **more}) for field, more in asked.items()]
    ends = render(tiny_registry, [*jobs, *small])
    assert isinstance(ends.pop("small"), p.Done)
    told = {job: (end.kind, end.error["field"].partition(".")[0]) for job, end in ends.items()}
    assert told == {field: ("job", field) for field in asked}
