"""Train what repaints holes, from the finished denoiser: the 9-channel UNet, or the inpainting ControlNet.

`python -m deploy.miniatures.repainter inpaint|controlnet --out DIR`, after `deploy.miniatures.denoiser`.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from deploy.miniatures import denoiser as base
from deploy.miniatures import words
from deploy.miniatures.holes import holes
from deploy.miniatures.training import Plan, parse_plan, sheet, train

ASKED = ["a dog", "a cat", "a pizza", "a star", "a house", ""]  # on a sample sheet


class Inpainter(nn.Module):
    """The denoiser with five more input channels: the mask, the latent of the picture with a grey hole."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
        super().__init__()
        self.net = widened(unet)
        self._vae = [vae]  # in a list: no part of what is trained

    def forward(self, x: Tensor, t: Tensor, told: Tensor, pictures: Tensor, masks: Tensor) -> Tensor:
        """The noise in x; pictures [B, 3, 256, 256] in -1..1, masks [B, 1, 256, 256] of 0 and 1."""
        hidden = base.encoded(self._vae[0], pictures * (1 - masks))
        small = F.interpolate(masks, size=(base.SIDE, base.SIDE), mode="bilinear").round()
        seen = torch.cat([x, small, hidden], 1)
        noise: Tensor = self.net(seen, t, encoder_hidden_states=told).sample
        return noise


class Controlled(nn.Module):
    """A frozen denoiser and the ControlNet that is trained to steer it."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.net = ControlNetModel.from_unet(unet, conditioning_channels=3)
        self._unet = [unet.requires_grad_(requires_grad=False)]

    def forward(self, x: Tensor, t: Tensor, told: Tensor, pictures: Tensor, masks: Tensor) -> Tensor:
        """The noise in x; the hint is the picture 0..1 with -1 in the hole."""
        hint = torch.where(masks > 0.5, -1.0, (pictures + 1) / 2)
        down, mid = self.net(x, t, encoder_hidden_states=told, controlnet_cond=hint, return_dict=False)
        added: dict[str, Any] = {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": mid,
        }
        noise: Tensor = self._unet[0](x, t, encoder_hidden_states=told, **added).sample
        return noise


def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same denoiser with five more input channels that it does not heed yet."""
    wide: UNet2DConditionModel = UNet2DConditionModel.from_config({**unet.config, "in_channels": 9})
    weights = unet.state_dict()
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, first.new_zeros(first.shape[0], 5, *first.shape[2:])], 1)
    wide.load_state_dict(weights)
    return wide.train()


def main() -> None:
    """Train, from the check point where there is one."""
    kind = sys.argv.pop(1)
    if kind not in {"inpaint", "controlnet"}:
        raise SystemExit(f"say inpaint or controlnet, not {kind}")
    plan = parse_plan(kind, steps=8_000, rate=5e-4, batch=128)
    vae, scenes, kept = base.load_vae(plan), plan.data(), base.kept_share(plan.device)
    clean = base.latents(plan, vae, scenes)
    unet = UNet2DConditionModel.from_pretrained(plan.out / "denoiser" / "unet").to(plan.device)
    module = (Inpainter(unet, vae) if kind == "inpaint" else Controlled(unet)).to(plan.device)
    reader = Reader(plan)

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(len(clean), (plan.batch,), device=plan.device)
        dice = random.Random(step)
        masks, said = holes(scenes, chosen, dice)
        told = reader.read(["" if dice.random() < base.SILENT else text for text in said])
        x, noise, t, weight = base.noised(clean[chosen], kept)
        return base.weighted_error(module(x, t, told, scenes.pictures(chosen), masks), noise, weight)

    def sample(shown: nn.Module, step: int) -> None:
        chosen = torch.arange(len(ASKED), device=plan.device)
        pictures = scenes.pictures(chosen)
        masks, _ = holes(scenes, chosen, random.Random(1))

        def paint(x: Tensor, t: Tensor, told: Tensor) -> Tensor:
            twice: Tensor = shown(x, t, told, pictures.repeat(2, 1, 1, 1), masks.repeat(2, 1, 1, 1))
            return twice

        told, empty = reader.read(ASKED), reader.read([""])
        made = base.draw(paint, told, empty, kept, 1)
        shown_ones = vae.decode(made / float(vae.config["scaling_factor"])).sample
        sheet([pictures * (1 - masks), shown_ones], plan.folder / f"sample-{step:06}.png")

    train(plan, module, loss_of, sample, module.net.parameters())
    module.net.save_pretrained(plan.folder / "model")


class Reader:
    """The finished text encoder; remembers what it has read."""

    def __init__(self, plan: Plan) -> None:
        self._tokenizer = words.load(plan.out / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(plan.out / "denoiser" / "text_encoder")
        self._encoder = encoder.to(plan.device).eval()
        self._places: dict[str, int] = {}
        self._states = torch.empty(0)

    @torch.no_grad()
    def read(self, said: list[str]) -> Tensor:
        """[B, 77, 128] of captions."""
        new = list(dict.fromkeys(text for text in said if text not in self._places))
        if new:
            ids = words.batch(self._tokenizer, new).to(self._encoder.device)
            read = self._encoder(ids).last_hidden_state.float()
            self._places.update({text: len(self._places) + at for at, text in enumerate(new)})
            self._states = torch.cat([self._states.to(read), read]) if len(self._states) else read
        return self._states[[self._places[text] for text in said]]


if __name__ == "__main__":
    main()
