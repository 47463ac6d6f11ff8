"""Train the miniature's text encoder and `UNet2DConditionModel` together, on latents of the finished VAE.

`python -m deploy.miniatures.denoiser --out DIR`, after `deploy.miniatures.vae`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from deploy.miniatures import words, world
from deploy.miniatures.data import Scenes
from deploy.miniatures.training import Plan, parse_plan, sheet, train

WIDTH = 128  # of the text's features
SIDE = world.SIZE // 8  # of a latent
SILENT = 0.1  # share of captions that are left out, so that guidance has something to push away from
SHEET_STEPS = 25
PROMPTS = (
    "a cat", "an apple and a rocket", "a frog and a heart on a white background",
    "a pizza on a blue background", "a panda, green background", "a house and a tree",
)  # fmt: skip


class Painter(nn.Module):
    """The text encoder and the denoiser: what a caption and a noisy latent go through."""

    def __init__(self, vocabulary: int, end: int) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=words.LENGTH, hidden_act="quick_gelu",
            projection_dim=WIDTH, bos_token_id=0, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        self.text = CLIPTextModel(config)
        self.unet = UNet2DConditionModel(
            sample_size=SIDE, in_channels=4, out_channels=4, block_out_channels=(64, 96, 128),
            layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """The noise in x [B, 4, h, w] at timesteps t [B], told captions' ids [B, 77]."""
        noise: Tensor = self.unet(x, t, encoder_hidden_states=self.text(ids).last_hidden_state).sample
        return noise


def kept_share(device: torch.device) -> Tensor:
    """Cumulative product of 1 - beta of Stable Diffusion's schedule, [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float().to(device)


def noised(latent: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(noisy latent, noise, timesteps, min-SNR-5 weights) of a batch of clean ones."""
    t = torch.randint(1000, (len(latent),), device=latent.device)
    noise = torch.randn_like(latent)
    share = kept[t].view(-1, 1, 1, 1)
    snr = share / (1 - share)
    return share.sqrt() * latent + (1 - share).sqrt() * noise, noise, t, (snr.clamp(max=5) / snr).view(-1)


def weighted_error(made: Tensor, noise: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the plain mean error for the log."""
    error = F.mse_loss(made.float(), noise, reduction="none").mean((1, 2, 3))
    return (error * weight).mean(), {"mse": error.detach().mean()}


def load_vae(plan: Plan) -> AutoencoderKL:
    """The finished VAE, for use only."""
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(plan.out / "vae" / "model")
    return vae.to(plan.device, memory_format=torch.channels_last).eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def encoded(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents [B, 4, 32, 32] of pictures in -1..1, scaled to unit deviation."""
    with torch.autocast(pictures.device.type, torch.bfloat16):
        mode = vae.encode(pictures).latent_dist.mode()
    return mode.float() * float(vae.config["scaling_factor"])


def latents(plan: Plan, vae: AutoencoderKL, scenes: Scenes) -> Tensor:
    """All scenes encoded once: float [N, 4, 32, 32]."""
    path = plan.out / "latents.pt"
    if not path.exists():
        numbers = torch.arange(len(scenes), device=plan.device).split(100)
        done = torch.cat([encoded(vae, scenes.pictures(part)).half() for part in numbers])
        part = path.with_suffix(f".{plan.name}")
        torch.save(done.cpu(), part)
        part.rename(path)
    return torch.load(path, weights_only=True).to(plan.device).float()


def main() -> None:
    """Train, from the check point where there is one."""
    plan = parse_plan("denoiser", steps=20_000, rate=1e-3, batch=256)
    vae, scenes = load_vae(plan), plan.data()
    clean = latents(plan, vae, scenes)
    tokenizer = words.load(plan.out / "tokenizer")
    ids = words.batch(tokenizer, scenes.captions).to(plan.device)
    empty = words.batch(tokenizer, [""]).to(plan.device)
    painter = Painter(tokenizer.get_vocab_size(), int(empty[0, -1])).to(plan.device)
    kept = kept_share(plan.device)

    def loss_of(_step: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(len(clean), (plan.batch,), device=plan.device)
        silent = torch.rand(plan.batch, 1, device=plan.device) < SILENT
        x, noise, t, weight = noised(clean[chosen], kept)
        return weighted_error(painter(x, t, torch.where(silent, empty, ids[chosen])), noise, weight)

    def sample(module: nn.Module, step: int) -> None:
        said = words.batch(tokenizer, PROMPTS).to(plan.device)
        drawn = [draw(module, said, empty, kept, seed) for seed in (1, 2, 3)]
        scale = float(vae.config["scaling_factor"])
        sheet([vae.decode(z / scale).sample for z in drawn], plan.folder / f"sample-{step:06}.png")

    train(plan, painter, loss_of, sample)
    painter.unet.save_pretrained(plan.folder / "unet")
    painter.text.save_pretrained(plan.folder / "text_encoder")


def draw(
    painter: Callable[[Tensor, Tensor, Tensor], Tensor], said: Tensor, empty: Tensor, kept: Tensor, seed: int
) -> Tensor:
    """DDIM from noise at guidance 4: for the sample sheets, not for users."""
    shape = (len(said), 4, SIDE, SIDE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(said.device)
    times = torch.linspace(999, 0, SHEET_STEPS + 1).round().long()
    for now, then in pairwise(times.tolist()):
        t = torch.full((2 * len(x),), now, device=x.device)
        both = painter(torch.cat([x, x]), t, torch.cat([empty.expand_as(said), said]))
        without, with_words = both.float().chunk(2)
        noise = without + 4 * (with_words - without)
        guess = (x - math.sqrt(1 - kept[now]) * noise) / math.sqrt(kept[now])
        x = math.sqrt(kept[then]) * guess + math.sqrt(1 - kept[then]) * noise
    return x


if __name__ == "__main__":
    main()
