"""Train the miniature's `AutoencoderKL`: f8, four channels. `python -m deploy.miniatures.vae --out DIR`."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.miniatures.training import Plan, parse_plan, pixels, sheet, signed, train

CROP, BATCH = 64, 12  # pixels; pictures


def build() -> AutoencoderKL:
    """The untrained network: 1.6 M parameters, no attention: a picture costs in proportion to its pixels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
    )


def reconstruction_loss(made: Tensor, true: Tensor) -> Tensor:
    """L1 of the pixels and of their differences to the neighbours, at three scales: edges count too."""
    total = made.new_zeros(())
    for _ in range(3):
        total = total + (made - true).abs().mean()
        for axis in (2, 3):
            total = total + (made.diff(dim=axis) - true.diff(dim=axis)).abs().mean()
        made, true = F.avg_pool2d(made, 2), F.avg_pool2d(true, 2)
    return total


def main() -> None:
    """Train, from the check point where there is one."""
    plan = parse_plan("vae", steps=9_000, rate=1.5e-3)
    data = pixels(plan.out)
    vae = build().to(plan.device)

    def batch(step: int) -> Tensor:
        dice = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(data), (BATCH,), generator=dice)
        at = torch.randint(128 - CROP + 1, (BATCH, 2), generator=dice)
        crops = [
            data[i, y : y + CROP, x : x + CROP]
            for i, (y, x) in zip(chosen.tolist(), at.tolist(), strict=True)
        ]
        return signed(torch.stack([torch.from_numpy(c.copy()) for c in crops]), plan.device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        true = batch(step)
        spread = vae.encode(true).latent_dist
        made = vae.decode(spread.sample()).sample.float()
        decibel = -10 * torch.log10(F.mse_loss(made.detach(), true) / 4)
        return reconstruction_loss(made, true) + 1e-6 * spread.kl().mean(), {"psnr": float(decibel)}

    train(plan, vae, loss_of, lambda module, step: _sample(plan, module, data, step))
    _measure_latents(vae, data, plan)
    vae.save_pretrained(plan.folder / "model")


def _sample(plan: Plan, vae: nn.Module, data, step: int) -> None:
    true = signed(data[:8], plan.device)
    sheet(
        [true, vae.decode(vae.encode(true).latent_dist.mode()).sample], plan.folder / f"sample-{step:06}.png"
    )


@torch.no_grad()
def _measure_latents(vae: AutoencoderKL, data, plan: Plan) -> None:
    """Set the scaling factor that gives latents unit deviation, as a denoiser expects them."""
    latents = [
        vae.encode(signed(data[i : i + 50], plan.device)).latent_dist.mode() for i in range(0, 500, 50)
    ]
    vae.register_to_config(scaling_factor=round(1 / float(torch.cat(latents).std()), 5))


if __name__ == "__main__":
    main()
