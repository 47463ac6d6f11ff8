"""The models that a worker has without a registry: what they weigh, what is offered, what a wheel holds."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from overpaint_worker.engine.clipseg.store import SegmenterStore
from overpaint_worker.engine.families.weights import read_header
from overpaint_worker.engine.models import ModelStore
from overpaint_worker.registry import SHIPPED, Registry
from tests.acceptance.commands import OVERPAINT, environment

ROOT = Path(__file__).parents[2]
FOLDER = SHIPPED.parent
WEIGHTS = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.safetensors"))
MB = 1_000_000
CPU = torch.device("cpu")


def test_they_are_small_enough_to_ship() -> None:
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 40 * MB
    assert max(sizes) < 15 * MB


@pytest.mark.parametrize("name", WEIGHTS)
def test_their_weights_are_halves(name: str) -> None:
    tensors = read_header(FOLDER / name, Registry.load(SHIPPED).model("mini")).tensors.values()
    assert {info.dtype for info in tensors if info.dtype.startswith("F")} == {"F16"}


def test_every_part_is_there_once() -> None:
    assert WEIGHTS == [
        "mini-clipseg/model.safetensors",
        "mini-controlnet-inpaint/diffusion_pytorch_model.safetensors",
        "mini-inpaint/unet/diffusion_pytorch_model.safetensors",
        "mini/text_encoder/model.safetensors",
        "mini/unet/diffusion_pytorch_model.safetensors",
        "mini/vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_worker_offers_them_all() -> None:
    registry = Registry.load(SHIPPED)
    offered = [*ModelStore(registry, CPU).catalogue(), *SegmenterStore(registry, CPU).catalogue()]
    assert {(each.kind, each.name, each.family, each.channels) for each in offered} == {
        ("model", "mini", "sd", 4),
        ("model", "mini-inpaint", "sd", 9),
        ("controlnet", "mini-inpaint", "sd", None),
        ("segmenter", "clipseg", "clipseg", None),
    }
    defaults = {each.defaults.size for each in offered if each.defaults is not None}
    assert defaults == {256}


def test_a_command_without_a_registry_renders_with_them(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photo.png")
    spec = {"version": 1, "model": "mini", "source": {"image": "photo.png"}, "method": {"kind": "img2img"}}
    (tmp_path / "job.json").write_text(json.dumps({**spec, "prompt": "a cat", "sampling": {"steps": 2}}))
    ran = subprocess.run(
        [OVERPAINT, "render", "job.json", "--threads", "1"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    with Image.open(tmp_path / "out" / "image.png") as picture:
        assert picture.size == (64, 64)


def test_a_wheel_has_them(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    shipped = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()]
    assert set(WEIGHTS) < set(shipped)
    assert {f"overpaint_worker/miniatures/{name}" for name in shipped} <= held
