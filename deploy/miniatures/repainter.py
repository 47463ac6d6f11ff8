"""Train what repaints holes, from the finished denoiser: the 9-channel UNet, or the inpainting ControlNet.

`python -m deploy.miniatures.repainter inpaint|controlnet --out DIR`, after `deploy.miniatures.denoiser`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from deploy.miniatures import holes, words
from deploy.miniatures.denoiser import BATCH, SILENT, kept_share, latents, noised
from deploy.miniatures.training import Plan, parse_plan, pixels, signed, train


def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same denoiser with five more input channels that it does not heed yet."""
    wide = UNet2DConditionModel.from_config({**unet.config, "in_channels": 9})
    weights = unet.state_dict()
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, first.new_zeros(first.shape[0], 5, *first.shape[2:])], 1)
    wide.load_state_dict(weights)
    return wide


class Controlled(nn.Module):
    """A frozen denoiser and the ControlNet that is trained to steer it."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.net = ControlNetModel.from_unet(unet, conditioning_channels=3)
        self.unet = unet.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, told: Tensor, hint: Tensor) -> Tensor:
        """The noise in x; hint [B, 3, 128, 128] is the picture 0..1 with -1 in the hole."""
        down, mid = self.net(x, t, encoder_hidden_states=told, controlnet_cond=hint, return_dict=False)
        added: dict[str, Any] = {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": mid,
        }
        noise: Tensor = self.unet(x, t, encoder_hidden_states=told, **added).sample
        return noise


def main() -> None:
    """Train, from the check point where there is one."""
    kind = sys.argv.pop(1)
    plan = parse_plan({"inpaint": "inpaint", "controlnet": "controlnet"}[kind], steps=2_500, rate=5e-4)
    vae = AutoencoderKL.from_pretrained(plan.out / "vae" / "model").to(plan.device).eval()
    base = UNet2DConditionModel.from_pretrained(plan.out / "denoiser" / "unet")
    told = _told(plan)
    clean, data, kept = latents(plan, vae), pixels(plan.out), kept_share()
    extra = holes.masked_latents(plan, vae)
    module: nn.Module = (widened(base) if kind == "inpaint" else Controlled(base)).to(plan.device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        dice = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(clean), (BATCH,), generator=dice)
        silent = torch.rand(BATCH, 1, 1, generator=dice) < SILENT
        x, noise, t, weight = noised(clean[chosen].to(plan.device), dice, kept)
        said = torch.where(silent, told[-1:], told[chosen]).to(plan.device)
        if kind == "inpaint":
            made = module(
                torch.cat([x, extra[chosen].to(plan.device)], 1), t, encoder_hidden_states=said
            ).sample
        else:
            made = module(x, t, said, _hints(data, chosen, plan))
        error = F.mse_loss(made.float(), noise, reduction="none").mean((1, 2, 3))
        return (error * weight).mean(), {"mse": float(error.detach().mean())}

    parameters = module.parameters() if kind == "inpaint" else module.net.parameters()  # type: ignore[union-attr]
    train(plan, module, loss_of, lambda _module, _step: None, parameters)
    (module if kind == "inpaint" else module.net).save_pretrained(plan.folder / "model")  # type: ignore[operator]


@torch.no_grad()
def _told(plan: Plan) -> Tensor:
    """What the text encoder makes of every hole's caption, and of the empty one last: [12001, 77, 128]."""
    tokenizer = words.load(plan.out / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(plan.out / "denoiser" / "text_encoder").eval()
    ids = torch.tensor([words.encode(tokenizer, text) for text in [*holes.captions(), ""]])
    unique, back = ids.unique(dim=0, return_inverse=True)
    states = torch.cat([encoder(part).last_hidden_state for part in unique.split(256)])
    return states[back]


def _hints(data: Any, chosen: Tensor, plan: Plan) -> Tensor:
    numbers = chosen.tolist()
    shown = (signed(torch.stack([torch.from_numpy(data[n].copy()) for n in numbers]), plan.device) + 1) / 2
    masks = torch.stack([torch.from_numpy(holes.hole(n)[0]) for n in numbers]).unsqueeze(1).to(plan.device)
    return torch.where(masks > 127, -torch.ones_like(shown), shown)


if __name__ == "__main__":
    main()
