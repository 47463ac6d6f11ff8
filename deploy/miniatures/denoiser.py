"""Train the miniature's text encoder and `UNet2DConditionModel` together, on latents of the finished VAE.

`python -m deploy.miniatures.denoiser --out DIR`, after `deploy.miniatures.vae`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from deploy.miniatures import words, world
from deploy.miniatures.training import COUNT, Plan, parse_plan, pixels, sheet, signed, train

BATCH, WIDTH = 32, 128
SHEET_STEPS = 25
SILENT = 0.1  # share of captions that are left out, so that guidance has something to push away from
PROMPTS = (
    "a cat", "a dog", "an apple and a rocket", "a frog and a heart on a white background",
    "a pizza on a blue background", "a panda, green background", "a sunflower on a purple background",
    "a car and a tree",
)  # fmt: skip


class Painter(nn.Module):
    """The text encoder and the denoiser: what a caption and a noisy latent go through."""

    def __init__(self, vocabulary: int, end: int, channels: int = 4) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=words.LENGTH, hidden_act="quick_gelu",
            projection_dim=WIDTH, bos_token_id=0, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        self.text = CLIPTextModel(config)
        self.unet = UNet2DConditionModel(
            sample_size=16, in_channels=channels, out_channels=4, block_out_channels=(64, 96, 128),
            layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """The noise in x [B, C, h, w] at timesteps t [B], told captions' ids [B, 77]."""
        noise: Tensor = self.unet(x, t, encoder_hidden_states=self.text(ids).last_hidden_state).sample
        return noise


def kept_share() -> Tensor:
    """Cumulative product of 1 - beta of Stable Diffusion's schedule, [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def noised(latent: Tensor, dice: torch.Generator, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(noisy latent, noise, timesteps, min-SNR-5 weights) of a batch of clean ones."""
    t = torch.randint(1000, (len(latent),), generator=dice).to(latent.device)
    noise = torch.randn(latent.shape, generator=dice).to(latent.device)
    share = kept.to(latent.device)[t].view(-1, 1, 1, 1)
    snr = share / (1 - share)
    return share.sqrt() * latent + (1 - share).sqrt() * noise, noise, t, (snr.clamp(max=5) / snr).view(-1)


@torch.no_grad()
def latents(plan: Plan, vae: AutoencoderKL) -> Tensor:
    """All scenes encoded once and scaled to unit deviation: float16 [12000, 4, 16, 16]."""
    path, data = plan.out / "latents.pt", pixels(plan.out)
    if not path.exists():
        scale = float(vae.config["scaling_factor"])
        done = [
            (vae.encode(signed(data[i : i + 100], plan.device)).latent_dist.mode() * scale).half().cpu()
            for i in range(0, len(data), 100)
        ]
        torch.save(torch.cat(done), path)
    return torch.load(path, weights_only=True).float()


def ids_of(plan: Plan, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Captions' token ids [count, 77], and the empty caption's [1, 77]."""
    tokenizer = words.load(plan.out / "tokenizer")
    captions = [world.scene(number).caption for number in range(count)]
    return torch.tensor([words.encode(tokenizer, c) for c in captions]), torch.tensor(
        [words.encode(tokenizer, "")]
    )


def main() -> None:
    """Train, from the check point where there is one."""
    plan = parse_plan("denoiser", steps=9_000, rate=1e-3)
    vae = AutoencoderKL.from_pretrained(plan.out / "vae" / "model").to(plan.device).eval()
    clean, (ids, empty) = latents(plan, vae), ids_of(plan)
    tokenizer = words.load(plan.out / "tokenizer")
    painter = Painter(tokenizer.get_vocab_size(), int(empty[0, -1])).to(plan.device)
    kept = kept_share()

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        dice = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(clean), (BATCH,), generator=dice)
        silent = torch.rand(BATCH, 1, generator=dice) < SILENT
        x, noise, t, weight = noised(clean[chosen].to(plan.device), dice, kept)
        said = torch.where(silent, empty, ids[chosen]).to(plan.device)
        error = F.mse_loss(painter(x, t, said).float(), noise, reduction="none").mean((1, 2, 3))
        return (error * weight).mean(), {"mse": float(error.detach().mean())}

    def sample(module: nn.Module, step: int) -> None:
        said = torch.tensor([words.encode(tokenizer, p) for p in PROMPTS]).to(plan.device)
        drawn = [draw(module, said, empty.to(plan.device), kept, seed) for seed in (1, 2, 3)]
        scale = float(vae.config["scaling_factor"])
        sheet([vae.decode(z / scale).sample for z in drawn], plan.folder / f"sample-{step:06}.png")

    train(plan, painter, loss_of, sample)
    painter.unet.save_pretrained(plan.folder / "unet")
    painter.text.save_pretrained(plan.folder / "text_encoder")


def draw(painter: nn.Module, said: Tensor, empty: Tensor, kept: Tensor, seed: int) -> Tensor:
    """DDIM from noise at guidance 4: for the sample sheets, not for users."""
    x = torch.randn((len(said), 4, 16, 16), generator=torch.Generator().manual_seed(seed)).to(said.device)
    times = torch.linspace(999, 0, SHEET_STEPS + 1).round().long()
    for now, then in pairwise(times):
        both = painter(
            torch.cat([x, x]), now.expand(2 * len(x)).to(x.device), torch.cat([empty.expand_as(said), said])
        )
        without, with_words = both.float().chunk(2)
        noise = without + 4 * (with_words - without)
        guess = (x - math.sqrt(1 - kept[now]) * noise) / math.sqrt(kept[now])
        x = math.sqrt(kept[then]) * guess + math.sqrt(1 - kept[then]) * noise
    return x


if __name__ == "__main__":
    main()
