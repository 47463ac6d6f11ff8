"""Workflows as ComfyUI exports them, converted and rendered as typed: the reference's pictures.

The graphs are in `data/workflows`. Four are those of recorded pictures; the others are held against jobs that
were written by hand from the same graphs, painted by the reference's way written a second time.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overpaint_shared.job import parse_job
from tests.acceptance.commands import Shell, environment
from tests.rendering import PARITY, pixels, render, request
from tests.second_jobs import again, files, job
from tests.segmenters import build, registry

WORKFLOWS = Path(__file__).parents[1] / "data" / "workflows"
RECORDED = ["img2img", "odd_vae_inpaint", "s_dpmpp_2m_karras", "controlnet_inpaint"]
TYPED = {"odd_vae_inpaint", "controlnet_inpaint", "mask_editor"}
"""Rendered by a process of their own."""
TEXTS: dict[str, Any] = {"negative_prompt": "blurry, low quality"}
CLIPSPACE = "clipspace/clipspace-mask-1733412.png"
INPAINTING = {"controlnet": "tiny", "strength": 0.7, "latent": "latent_noise_mask"}
BY_HAND = {
    "mask_editor": job(
        "latent_noise_mask", CLIPSPACE, {"from": "alpha", "ops": [{"op": "grow", "by": 5}]},
        steps=4, denoise=0.8, sampler="euler_ancestral", scheduler="karras", **TEXTS,
    ),
    "controlnet_over_the_latent": job(
        "controlnet_inpaint", "rgba.png", {"from": "alpha"}, method=INPAINTING,
        steps=4, denoise=0.75, scheduler="sgm_uniform", **TEXTS,
    ),
    "outpaint": job(
        "vae_encode_inpaint", "small.png", {"from": "pad"}, method={"grow_mask_by": 8}, steps=4,
        prepare=[{"op": "pad", "right": 40, "bottom": 16, "feathering": 24}], **TEXTS,
    ),
    "upscale": job(
        "img2img", "small.png", None, steps=4, denoise=0.5, sampler="dpmpp_2m",
        prepare=[{"op": "scale_by", "factor": 1.5, "filter": "bicubic"}], **TEXTS,
    ),
    "upscale_masked": job(
        "latent_noise_mask", "small.png", "large.png", steps=4, denoise=0.5,
        prepare=[{"op": "scale_by", "factor": 1.5, "filter": "bilinear"}], **TEXTS,
    ),
    "clipseg": job("latent_noise_mask", "img64.png", "found.png", steps=4, denoise=0.9, **TEXTS),
    "inpaint_model": job(
        "inpaint_model", "small.png", "soft.png", model="tiny-inpaint", steps=5, differential=True, **TEXTS
    ),
    "late_start": job(
        "img2img", "small.png", None, seed=2**64 - 1, steps=4, denoise=0.4, sampler="heun", clip_skip=1,
        **TEXTS,
    ),
    "composite": job(
        "latent_noise_mask", "img64.png",
        {"from": "image", "image": "mask64.png", "ops": [{"op": "invert"}]},
        steps=4, denoise=0.8, **TEXTS,
    ) | {"composite": True},
}  # fmt: skip
"""What each graph means."""


@pytest.fixture(scope="module")
def models(tiny_registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models' registry, with a tiny segmenter."""
    folder = tmp_path_factory.mktemp("models")
    return registry(folder, build(folder / "clipseg"), tiny_registry)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A folder with the workflows, and ComfyUI's input folder beside them."""
    for name, data in {**files(), CLIPSPACE: files()["rgba.png"]}.items():
        path = tmp_path / "ComfyUI" / "input" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for path in WORKFLOWS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return Shell(tmp_path, environment(more={"OMP_NUM_THREADS": "1"}))


def rendered(shell: Shell, name: str, models: Path) -> dict[str, bytes]:
    """The files of a workflow's picture, by two commands."""
    converted = shell.overpaint(
        "convert", f"{name}.json", "--input-dir", "ComfyUI/input", "--out", "jobs",
        "--model-map", "v1-5-pruned-emaonly=tiny", "--model-map", "sd-v1-5-inpainting.ckpt=tiny-inpaint",
        "--model-map", "control_v11p_sd15_inpaint_fp16.safetensors=tiny",
    )  # fmt: skip
    assert converted.code == 0, converted.err
    path = shell.folder / "jobs" / f"{name}-job.json"
    if name not in TYPED:
        return in_this_process(path, models)
    ran = shell.overpaint(
        "render", f"jobs/{path.name}", "--registry", str(models), "--device", "cpu", "--threads", "1",
        "--out", name, "--quiet",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return {file.name: file.read_bytes() for file in (shell.folder / name).iterdir()}


def in_this_process(path: Path, models: Path) -> dict[str, bytes]:
    """What the second command does, without loading torch again."""
    spec = json.loads(path.read_text())
    given = {name: (path.parent / name).read_bytes() for _, name in parse_job(spec).image_refs()}
    done = render(models, [request("j", spec, given)])["j"]
    assert hasattr(done, "files"), done
    return dict(done.files)


def assert_same(picture: bytes, expected: np.ndarray) -> None:
    ours = pixels(picture)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected.astype(np.int16)).max() <= 1


@pytest.mark.parametrize("name", RECORDED)
def test_a_workflow_of_a_recorded_picture_paints_it(name: str, shell: Shell, models: Path) -> None:
    expected = pixels((PARITY / "cases" / name / "expected.png").read_bytes())[..., :3]
    assert_same(rendered(shell, name, models)["image.png"], expected)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_workflow_paints_what_the_reference_would(
    name: str, shell: Shell, models: Path, tiny_registry: Path
) -> None:
    made = rendered(shell, name, models)
    given = {**files(), CLIPSPACE: files()["rgba.png"]}
    if name == "clipseg":
        given["found.png"] = made["mask.png"]
        assert 0.05 < pixels(given["found.png"]).mean() / 255 < 0.95
    assert_same(made["image.png"], again(tiny_registry, BY_HAND[name], given).levels)


def test_every_workflow_is_held_against_something() -> None:
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == {*RECORDED, *BY_HAND}
