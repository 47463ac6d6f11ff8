"""Holes to train repainting with, one a scene, and what is said of what belongs there."""

from __future__ import annotations

import random

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from deploy.miniatures import world
from deploy.miniatures.training import COUNT, Plan, pixels, signed


def hole(number: int) -> tuple[np.ndarray, str]:
    """A mask [128, 128] of 0 and 255 for that scene, and a caption of what it hides or of the whole scene."""
    dice, scene = random.Random(-number - 1), world.scene(number)
    word = dice.choice(list(scene.masks))
    sheet = Image.new("L", (world.SIZE, world.SIZE))
    kind = dice.choice(("object", "object", "box", "box", "anywhere"))
    if kind == "object":
        sheet = Image.fromarray(scene.masks[word]).filter(ImageFilter.MaxFilter(2 * dice.randint(2, 8) + 1))
    else:
        box = _around(dice, Image.fromarray(scene.masks[word])) if kind == "box" else _anywhere(dice)
        draw = ImageDraw.Draw(sheet)
        (draw.ellipse if dice.random() < 0.4 else draw.rectangle)(box, fill=255)
    mask = (np.asarray(sheet) > 127).astype(np.uint8) * 255
    hidden = kind != "anywhere"
    own = dice.choice((world.article(word), f"{world.article(word)} on a {scene.ground} background"))
    return mask, own if hidden and dice.random() < 0.6 else scene.caption


def _around(dice: random.Random, mask: Image.Image) -> tuple[int, int, int, int]:
    left, top, right, bottom = mask.getbbox() or (32, 32, 96, 96)
    grow = [dice.randint(2, 16) for _ in range(4)]
    return (
        max(left - grow[0], 0),
        max(top - grow[1], 0),
        min(right + grow[2], 127),
        min(bottom + grow[3], 127),
    )


def _anywhere(dice: random.Random) -> tuple[int, int, int, int]:
    width, height = dice.randint(24, 96), dice.randint(24, 96)
    x, y = dice.randint(0, 127 - width), dice.randint(0, 127 - height)
    return x, y, x + width, y + height


@torch.no_grad()
def masked_latents(plan: Plan, vae: AutoencoderKL) -> Tensor:
    """Rounded mask, and latent of the picture with grey in its hole: float [12000, 5, 16, 16]."""
    path, data, scale = plan.out / "holes.pt", pixels(plan.out), float(vae.config["scaling_factor"])
    if not path.exists():
        done = []
        for start in range(0, COUNT, 100):
            masks = torch.from_numpy(np.stack([hole(n)[0] for n in range(start, start + 100)]))
            masks = (masks.unsqueeze(1).float() / 255).to(plan.device)
            grey = signed(data[start : start + 100], plan.device) * (1 - masks)
            small = torch.nn.functional.interpolate(masks, size=(16, 16), mode="bilinear").round()
            done.append(torch.cat([small, vae.encode(grey).latent_dist.mode() * scale], 1).half().cpu())
        torch.save(torch.cat(done), path)
    return torch.load(path, weights_only=True).float()


def captions() -> list[str]:
    """What is said of each scene's hole."""
    return [hole(number)[1] for number in range(COUNT)]
