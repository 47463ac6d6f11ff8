"""Weights to measure speed with, written as a diffusers folder and named by a `models.toml`.

    .venv/bin/python bench/weights.py sd15 FOLDER --device cuda:0

writes them once for several benches, which take them by `--registry FOLDER/models.toml --model sd15`.

`sd15` has Stable Diffusion 1.5's real shapes and random values, made on the device that is measured; `tiny`
are those that the tests render with. What weights hold hardly moves the time that they take, as long as they
are no zeros.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from overpaint_worker.engine import families

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = Path(families.__file__).parent
SHAPES = ("sd15", "tiny")
SIZE = {"sd15": 512, "tiny": 128}
"""What a job works at where it does not say."""


@contextmanager
def registry(shape: str, device: str) -> Iterator[Path]:
    """A `models.toml` that names the weights by their shape, and weights that are gone afterwards."""
    with TemporaryDirectory(prefix="overpaint-bench-") as name:
        yield build(shape, Path(name), device)


def build(shape: str, folder: Path, device: str) -> Path:
    """Write weights of that shape, and the `models.toml` that names them, which is returned."""
    path = of_the_tests() if shape == "tiny" else folder / shape
    if path.parent == folder:
        write(FAMILIES / "configs" / shape, path, torch.device(device))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "models.toml").write_text(
        f'[models.{shape}]\nfamily = "sd"\npath = "{path.resolve()}"\ndefaults = {{ size = {SIZE[shape]} }}\n'
    )
    return folder / "models.toml"


def of_the_tests() -> Path:
    """A diffusers folder of Stable Diffusion 1.5's parts, small and random."""
    sys.path.insert(0, str(ROOT))
    from tests.weights import build_tiny_registry

    return build_tiny_registry().parent / "weights" / "diffusers" / "sd15"


@torch.no_grad()
def write(config: Path, folder: Path, device: torch.device) -> None:
    """Random float16 weights of that configuration, about two bytes per parameter on the disk."""
    for part, network in networks(config, device).items():
        network.half().save_pretrained(folder / part)
    shutil.copytree(config / "scheduler", folder / "scheduler")


def networks(config: Path, device: torch.device) -> dict[str, Any]:
    """UNet, VAE and text encoder on the device; the UNet's answer to noise has the spread of noise."""
    told = {part: json.loads((config / part / "config.json").read_text()) for part in ("unet", "vae")}
    torch.manual_seed(20)
    with device:
        unet: Any = UNet2DConditionModel.from_config(told["unet"]).eval()
        vae: Any = AutoencoderKL.from_config(told["vae"]).eval()
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(str(config / "text_encoder"))).eval()
        noise = torch.randn(1, unet.config.in_channels, 32, 32)
        states = torch.randn(1, 77, unet.config.cross_attention_dim)
        unet.conv_out.weight.div_(unet(noise, 500, encoder_hidden_states=states).sample.std())
    return {"unet": unet, "vae": vae, "text_encoder": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", help="to make them on (cpu)")
    wish = parser.parse_args()
    print(build(wish.shape, wish.folder, wish.device))


if __name__ == "__main__":
    main()
