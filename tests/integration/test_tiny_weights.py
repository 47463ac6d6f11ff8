"""The demonstration weights do what their description says, and are the same every time."""

from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.nn import functional as F  # noqa: N812 - its usual name

from overpaint_worker.engine import tiny_weights as tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.build(folder)
    return folder


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """[1, 3, 96, 96] in -1..1, smooth."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, size=(96, 96), mode="bilinear", align_corners=True)


@torch.no_grad()
def test_a_latent_is_the_mean_colour_of_its_block(folder: Path, picture: torch.Tensor) -> None:
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    latent = vae.encode(picture).latent_dist.mode() * vae.config.scaling_factor
    assert torch.allclose(latent[:, :3] / tiny.LATENT_GAIN, F.avg_pool2d(picture, 8), atol=0.01)


@torch.no_grad()
def test_the_vae_gives_a_smooth_picture_back(folder: Path, picture: torch.Tensor) -> None:
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    back = vae.decode(vae.encode(picture).latent_dist.mode()).sample
    inside = slice(8, -8)  # convolutions see zeros beyond the edge
    assert (back - picture)[..., inside, inside].abs().mean() < 0.05


@torch.no_grad()
def test_the_unet_takes_for_noise_what_differs_from_its_surroundings(folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    text = torch.zeros(1, 77, tiny.WIDTH)
    flat, rough = (unet(x, 500, encoder_hidden_states=text).sample for x in (noise * 0 + 1, noise))
    inside = slice(6, -6)
    assert torch.corrcoef(torch.stack([rough.flatten(), noise.flatten()]))[0, 1] > 0.9
    assert flat[..., inside, inside].abs().mean() < 0.5 < rough[..., inside, inside].abs().mean()


def test_the_weights_are_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    tiny.build(tmp_path)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 7
    assert all((folder / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)
