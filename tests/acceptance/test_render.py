"""`overpaint render` and `overpaint prepare`, as typed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from overpaint_shared.job import parse_job
from overpaint_worker.here import engine_options, prepared
from tests.rendering import INPUTS, PARITY, img2img, pixels

OVERPAINT = Path(sys.executable).with_name("overpaint")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def overpaint(*words, cwd):
    return subprocess.run(
        [OVERPAINT, *map(str, words)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.fixture
def folder(tmp_path):
    """A job and its pictures, beside each other, in a folder that is not the current one."""
    jobs = tmp_path / "jobs"
    shutil.copytree(INPUTS, jobs / "pictures")
    return jobs


def write(folder, spec, name="job.json"):
    path = folder / name
    path.write_text(json.dumps(spec))
    return path


def test_render_writes_the_references_picture_and_its_receipt(folder, tmp_path, tiny_registry):
    spec = json.loads((PARITY / "cases/img2img/job.json").read_text())
    spec["source"]["image"] = "pictures/img256.png"
    job = write(folder, spec)
    ran = overpaint(
        "render", job, "--registry", tiny_registry, "--device", "cpu", "--out", "result", cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["result/image.png", "result/receipt.json"]
    expected = pixels((PARITY / "cases/img2img/expected.png").read_bytes())
    assert np.abs(pixels((tmp_path / "result/image.png").read_bytes()) - expected).max() <= 1
    receipt = json.loads((tmp_path / "result/receipt.json").read_text())
    assert receipt["spec"]["sampling"]["seed"] == 42


def test_render_with_a_mask_says_what_it_wrote_in_json(folder, tmp_path, tiny_registry):
    spec = img2img(image="pictures/img64.png", steps=2)
    spec["mask"] = {"from": "image", "image": "pictures/mask64.png"}
    job = write(folder, spec)
    ran = overpaint("render", job, "--registry", tiny_registry, "--out", "r", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["files"] == ["r/image.png", "r/mask.png", "r/receipt.json"]
    assert (said["width"], said["height"], said["seed"]) == (64, 64, 42)
    mask = pixels((tmp_path / "r/mask.png").read_bytes())[..., 0]
    out, before = (pixels(p.read_bytes())[..., :3] for p in (tmp_path / "r/image.png", INPUTS / "img64.png"))
    assert np.array_equal(out[mask == 0], before[mask == 0])


def test_prepare_shows_canvas_and_mask_without_a_registry(folder, tmp_path):
    spec = img2img(image="pictures/img64.png")
    spec["prepare"] = [{"op": "pad", "right": 16, "feathering": 4}]
    spec["mask"] = {"from": "pad"}
    ran = overpaint("prepare", write(folder, spec), "--out", "look", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["files"] == ["look/canvas.png", "look/mask.png"]
    assert (said["width"], said["height"]) == (80, 64)
    canvas = pixels((tmp_path / "look/canvas.png").read_bytes())
    assert canvas.shape == (64, 80, 3)
    mask = pixels((tmp_path / "look/mask.png").read_bytes())[..., 0]
    assert (mask[:, 64:] == 255).all()
    assert (mask[:, :56] == 0).all()


def test_prepare_cuts_levels_off_under_compat_as_render_does(folder):
    def canvas(**more):
        spec = parse_job({
            **img2img(image="pictures/img64.png"), **more,
            "prepare": [{"op": "scale_by", "factor": 1.5, "filter": "bilinear"}],
        })  # fmt: skip
        inputs = {"pictures/img64.png": (folder / "pictures/img64.png").read_bytes()}
        return pixels(prepared(spec, inputs, engine_options(folder, "cpu", 1))[0]["canvas.png"])

    off = canvas(compat="none") - canvas(compat="comfyui")
    assert set(np.unique(off)) == {0, 1}


WRONG = {
    "a spec with a typing error": ({"scource": {"image": "x.png"}}, 2, "source"),
    "a picture that is not there": ({"source": {"image": "pictures/none.png"}}, 1, "source.image"),
    "a picture that never ends": (
        {"source": {"image": "/dev/zero"}},
        1,
        "source.image: /dev/zero is no file",
    ),
    "a number that is none": ({"sampling": {"cfg": float("nan")}}, 2, "sampling.cfg: holds NaN"),
    "a picture of the farm's store": ({"source": {"image": "s3://bucket/key.png"}}, 1, "source.image"),
    "a model that the registry has not": ({"model": "sdxl"}, 1, "no model 'sdxl' (use tiny, tiny-"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_words_with_its_exit_code(what, folder, tmp_path, tiny_registry):
    changes, code, words = WRONG[what]
    job = write(folder, {**img2img(image="pictures/img64.png"), **changes})
    ran = overpaint("render", job, "--registry", tiny_registry, cwd=tmp_path)
    assert ran.returncode == code, ran.stderr
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not ran.stdout
    assert not (tmp_path / "out").exists()


def test_an_error_is_json_on_standard_error_as_of_every_command(folder, tmp_path, tiny_registry):
    job = write(folder, {"version": 2})
    ran = overpaint("render", job, "--registry", tiny_registry, "--json", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert json.loads(ran.stderr)["error"]["code"] == "spec"


def test_help_has_examples_and_needs_no_torch(tmp_path):
    ran = overpaint("render", "--help", cwd=tmp_path)
    assert ran.returncode == 0
    assert "overpaint render job.json --out result" in ran.stdout
    assert "OVERPAINT_REGISTRY" in ran.stdout
    code = "import sys, overpaint_worker.commands; print('torch' in sys.modules)"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "False"


def test_an_interrupted_render_ends_with_130_and_writes_nothing(folder, tmp_path, tiny_registry):
    job = write(folder, img2img(image="pictures/img64.png", steps=999))
    running = subprocess.Popen(
        [OVERPAINT, "render", job, "--registry", tiny_registry, "--out", "r"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with running:
        while "torch" not in Path(f"/proc/{running.pid}/maps").read_text():
            assert running.poll() is None  # the command itself has begun, past its start-up
        running.send_signal(signal.SIGINT)
        _, said = running.communicate()
    assert running.returncode == 130, said
    assert not (tmp_path / "r").exists()
