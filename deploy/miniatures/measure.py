"""What the finished VAE and segmenter make of scenes that nobody was trained on, as one JSON object.

`python -m deploy.miniatures.measure --models FOLDER`: the folder that `deploy.miniatures.export` wrote.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPSegForImageSegmentation

from deploy.miniatures import data, words, world

UNSEEN = 1_000_000  # the first number of a scene that training never draws


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m deploy.miniatures.measure")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    scenes = [world.scene(UNSEEN + number) for number in range(given.scenes)]
    figures = {"scenes": given.scenes, "vae_psnr": decibels(given.models / "mini" / "vae", scenes)}
    print(json.dumps({**figures, **overlaps(given.models / "mini-clipseg", scenes)}, indent=2))


@torch.no_grad()
def decibels(folder: Path, scenes: list[world.Scene]) -> float:
    """Mean peak signal-to-noise ratio of scenes that went through the VAE and came back, dB."""
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
    found = []
    for scene in scenes:
        true = _signed(scene)
        made = vae.decode(vae.encode(true).latent_dist.mode()).sample.clamp(-1, 1)
        found.append(float(-10 * torch.log10(F.mse_loss(made, true) / 4)))
    return round(statistics.fmean(found), 2)


@torch.no_grad()
def overlaps(folder: Path, scenes: list[world.Scene]) -> dict[str, object]:
    """Intersection over union of found and true masks: the mean, the two worst words'; and what share of a
    picture is found of a word that is not in it.
    """
    model = CLIPSegForImageSegmentation.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = words.load(folder)
    by_word: dict[str, list[float]] = defaultdict(list)
    imagined = []
    for number, scene in enumerate(scenes):
        absent = [word for word in world.OBJECTS if word not in scene.masks][number % 28]
        asked = [*scene.masks, absent]
        ids = words.batch(tokenizer, asked)
        seen = _signed(scene).expand(len(asked), -1, -1, -1)
        found = model(input_ids=ids, pixel_values=seen).logits > 0
        for place, (word, mask) in enumerate(scene.masks.items()):
            by_word[word].append(_overlap(found[place].numpy(), mask > 127))
        imagined.append(float(found[-1].float().mean()))
    means = sorted((round(statistics.fmean(each), 3), word) for word, each in by_word.items())
    every = [each for word in by_word.values() for each in word]
    return {
        "iou": round(statistics.fmean(every), 3),
        "iou_worst_words": {word: mean for mean, word in means[:2]},
        "share_found_of_absent_words": round(statistics.fmean(imagined), 4),
    }


def _signed(scene: world.Scene) -> Tensor:
    return data.signed(torch.from_numpy(scene.pixels.copy())[None])


def _overlap(found: np.ndarray, true: np.ndarray) -> float:
    return float((found & true).sum() / max(int((found | true).sum()), 1))


if __name__ == "__main__":
    main()
