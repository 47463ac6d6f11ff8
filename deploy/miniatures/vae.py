"""Train the miniature's `AutoencoderKL`: f8, four channels. `python -m deploy.miniatures.vae --out DIR`."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.miniatures.data import Scenes
from deploy.miniatures.training import Plan, parse_plan, sheet, train
from deploy.miniatures.world import SIZE

CROP = 128  # pixels
SCALES = 3  # at which pictures are compared, each half the size of the one before


def build() -> AutoencoderKL:
    """The untrained network: 3.3 M parameters, no attention: a picture costs in proportion to its pixels."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=1.0,
        force_upcast=False,
    )


def reconstruction_loss(made: Tensor, true: Tensor) -> Tensor:
    """L1 of the pixels and of their differences to the neighbours, at three scales: edges count too."""
    total = made.new_zeros(())
    for _ in range(SCALES):
        total = total + (made - true).abs().mean()
        for axis in (2, 3):
            total = total + (made.diff(dim=axis) - true.diff(dim=axis)).abs().mean()
        made, true = F.avg_pool2d(made, 2), F.avg_pool2d(true, 2)
    return total


def main() -> None:
    """Train, from the check point where there is one."""
    plan = parse_plan("vae", steps=20_000, rate=1e-3, batch=64)
    scenes = plan.data()
    vae = build().to(plan.device, memory_format=torch.channels_last)

    def loss_of(_step: int) -> tuple[Tensor, dict[str, Tensor]]:
        true = crops(scenes, plan)
        spread = vae.encode(true).latent_dist
        made = vae.decode(spread.sample()).sample.float()
        decibel = -10 * torch.log10(F.mse_loss(made.detach(), true) / 4)
        return reconstruction_loss(made, true) + 1e-6 * spread.kl().mean(), {"psnr": decibel}

    train(plan, vae, loss_of, lambda module, step: _sample(plan, module, scenes, step))
    _measure_latents(vae, scenes)
    vae.save_pretrained(plan.folder / "model")


def crops(scenes: Scenes, plan: Plan) -> Tensor:
    """A batch of 128 x 128 pixels, out of random scenes at one random place, float [B, 3, 128, 128]."""
    chosen = torch.randint(len(scenes), (plan.batch,), device=plan.device)
    y, x = torch.randint(SIZE - CROP + 1, (2,)).tolist()
    part = scenes.pixels[chosen, y : y + CROP, x : x + CROP].permute(0, 3, 1, 2)
    return (part.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _sample(plan: Plan, vae: nn.Module, scenes: Scenes, step: int) -> None:
    true = scenes.pictures(torch.arange(6))
    made = vae.decode(vae.encode(true).latent_dist.mode()).sample  # type: ignore[operator]
    sheet([true, made], plan.folder / f"sample-{step:06}.png")


@torch.no_grad()
def _measure_latents(vae: AutoencoderKL, scenes: Scenes) -> None:
    """Set the scaling factor that gives latents unit deviation, as a denoiser expects them."""
    numbers = torch.arange(min(500, len(scenes))).split(50)
    parts = [vae.encode(scenes.pictures(part)).latent_dist.mode() for part in numbers]
    vae.register_to_config(scaling_factor=round(1 / float(torch.cat(parts).std()), 5))


if __name__ == "__main__":
    main()
