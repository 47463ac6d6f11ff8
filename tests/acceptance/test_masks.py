"""`overpaint mask` and `overpaint rerender`, as typed."""

import json
import shutil

import numpy as np
import pytest

from tests import segmenters
from tests.acceptance.test_render import overpaint, write
from tests.rendering import INPUTS, img2img, pixels

WORDS = {"from": "clipseg", "text": "the hat", "threshold": 0.97, "blur": 0.8, "dilation_factor": 1}


@pytest.fixture
def folder(tmp_path):
    jobs = tmp_path / "jobs"
    shutil.copytree(INPUTS, jobs / "pictures")
    return jobs


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return segmenters.build(tmp_path_factory.mktemp("segmenter") / "clipseg")


def job(folder, **more):
    return write(folder, {**img2img(image="pictures/img_odd.png", steps=2), **more})


def test_mask_needs_no_diffusion_model(folder, tmp_path, segmenter):
    registry = segmenters.registry(tmp_path, segmenter)
    ran = overpaint(
        "mask", job(folder, mask=WORDS), "--registry", registry, "--out", "look", "--json", cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["files"] == ["look/mask.png", "look/heatmap.png"]
    shape = pixels((INPUTS / "img_odd.png").read_bytes()).shape
    mask, heat = (pixels((tmp_path / name).read_bytes()) for name in said["files"])
    assert mask.shape == heat.shape == shape
    assert said["mask_coverage"] == pytest.approx(mask.mean() / 255, abs=1e-5)
    assert 0.02 < said["mask_coverage"] < 0.98


def test_mask_makes_masks_of_every_kind_without_a_registry(folder, tmp_path):
    mask = {"from": "image", "image": "pictures/mask_odd.png"}
    ran = overpaint("mask", job(folder, mask=mask), "--out", "look", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["look/mask.png"]


WRONG = {
    "a segmenter that there is not": ({**WORDS, "segmenter": "sam"}, 1, "no segmenter 'sam' (use clipseg"),
    "words that find nothing": ({**WORDS, "threshold": 1.0}, 1, "mask.text"),
    "no mask at all": (None, 2, "mask"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_mask_is_said_in_words(what, folder, tmp_path, segmenter):
    mask, code, words = WRONG[what]
    registry = segmenters.registry(tmp_path, segmenter)
    ran = overpaint("mask", job(folder, mask=mask), "--registry", registry, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (code, ""), ran.stderr
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_receipt_is_rendered_again_from_pictures_of_any_name(folder, tmp_path, tiny_registry):
    mask = {"from": "image", "image": "pictures/mask_odd.png"}
    first = overpaint(
        "render", job(folder, mask=mask), "--registry", tiny_registry, "--threads", "3", "--out", "out",
        cwd=tmp_path,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    lost = overpaint("rerender", "out/receipt.json", "--registry", tiny_registry, cwd=tmp_path)
    assert lost.returncode == 1
    assert "--inputs" in lost.stderr
    (folder / "pictures" / "img_odd.png").rename(tmp_path / "out" / "called otherwise")
    again = overpaint(
        "rerender", "out/receipt.json", "--registry", tiny_registry,
        "--inputs", folder / "pictures", "--json", "--out", "again", cwd=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    said = json.loads(again.stdout)
    assert said["same"] is True
    assert said["changed"] == []
    one, other = ((tmp_path / name / "image.png").read_bytes() for name in ("out", "again"))
    assert np.array_equal(pixels(one), pixels(other))
    assert json.loads((tmp_path / "again/receipt.json").read_text())["device"]["threads"] == 3

    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    receipt["spec"]["sampling"]["seed"] = 43
    (tmp_path / "out/receipt.json").write_text(json.dumps(receipt))
    other = overpaint(
        "rerender", "out/receipt.json", "--registry", tiny_registry, "--inputs", folder / "pictures",
        cwd=tmp_path,
    )  # fmt: skip
    assert other.returncode == 1
    assert other.stdout.startswith("another picture: ")


def test_a_png_brings_its_own_receipt_and_what_is_none_is_refused(folder, tmp_path, tiny_registry):
    first = overpaint("render", job(folder), "--registry", tiny_registry, "--out", "out", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    shutil.copy(tmp_path / "out" / "image.png", folder / "pictures" / "alone.png")
    again = overpaint(
        "rerender", folder / "pictures" / "alone.png", "--registry", tiny_registry, cwd=tmp_path
    )
    assert (again.returncode, again.stdout) == (0, "the same picture\n"), again.stderr
    for name in ("jobs/pictures/img64.png", "jobs/job.json"):
        refused = overpaint("rerender", name, "--registry", tiny_registry, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "no receipt" in refused.stderr
