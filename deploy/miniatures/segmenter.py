"""Train the miniature's `CLIPSegForImageSegmentation`: a word to where it is. Knows nothing of the VAE.

`python -m deploy.miniatures.segmenter --out DIR`. Words that are not in the picture are asked too, so that
"nothing here" is an answer it can give; pictures are roughened at random, as rendered ones are.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from deploy.miniatures import words, world
from deploy.miniatures.data import Scenes
from deploy.miniatures.training import parse_plan, sheet, train

WIDTH, PATCH, LAYERS = 96, 8, 5
ABSENT = 0.3  # share of questions for what is not there
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": world.SIZE, "width": world.SIZE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
WORDINGS = ("{0}", "{0}", "{1}", "the {0}", "a picture of {1}")


def build(vocabulary: int, end: int) -> CLIPSegForImageSegmentation:
    """The untrained network: 256 pixels, patches of 8, five layers of width 96."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    config = CLIPSegConfig(
        text_config={
            **shared, "num_hidden_layers": 2, "vocab_size": vocabulary, "bos_token_id": 0,
            "max_position_embeddings": words.LENGTH, "eos_token_id": end, "pad_token_id": end,
        },
        vision_config={
            **shared, "num_hidden_layers": LAYERS, "image_size": world.SIZE, "patch_size": PATCH,
        },
        projection_dim=WIDTH, extract_layers=[1, 3, 4], reduce_dim=48, decoder_num_attention_heads=4,
        decoder_intermediate_size=192, conditional_layer=0, use_complex_transposed_convolution=False,
    )  # fmt: skip
    return CLIPSegForImageSegmentation(config)


def questions(scenes: Scenes, chosen: Tensor, dice: random.Random) -> tuple[list[str], Tensor]:
    """A wording of a word for each scene, and where that word is [B, 256, 256], 0 or 1."""
    asked, places = [], []
    for number in chosen.tolist():
        there = scenes.words[number]
        place = -1 if dice.random() < ABSENT else dice.randrange(len(there))
        absent = [word for word in world.OBJECTS if word not in there]
        word = dice.choice(absent) if place < 0 else there[place]
        asked.append(dice.choice(WORDINGS).format(word, world.article(word)))
        places.append(place + 1 or 255)  # no label is 255
    wanted = torch.tensor(places, device=scenes.labels.device).view(-1, 1, 1)
    return asked, (scenes.labels[chosen] == wanted).float()


def roughened(pictures: Tensor, dice: random.Random) -> Tensor:
    """As they are, or blurred a little, or with grain."""
    size = pictures.shape[-2:]
    if dice.random() < 0.4:
        small = F.interpolate(pictures, scale_factor=dice.uniform(0.35, 0.9), mode="bilinear", antialias=True)
        pictures = F.interpolate(small, size=size, mode="bicubic")
    if dice.random() < 0.4:
        pictures = pictures + torch.randn_like(pictures) * dice.uniform(0, 0.08)
    return pictures


def main() -> None:
    """Train, from the check point where there is one."""
    plan = parse_plan("segmenter", steps=15_000, rate=1e-3, batch=48)
    scenes, tokenizer = plan.data(), words.load(plan.out / "tokenizer")
    model = build(tokenizer.get_vocab_size(), tokenizer.token_to_id(words.END)).to(plan.device)

    def batch(step: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        dice = random.Random(step)
        chosen = torch.randint(len(scenes), (count,), device=plan.device)
        asked, truth = questions(scenes, chosen, dice)
        ids = words.batch(tokenizer, asked).to(plan.device)
        return roughened(scenes.pictures(chosen), dice), ids, truth

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        seen, ids, truth = batch(step, plan.batch)
        logits = model(input_ids=ids, pixel_values=seen).logits.float()
        likely = logits.sigmoid()
        both, either = (likely * truth).sum((1, 2)), (likely + truth).sum((1, 2))
        overlap = (1 - (2 * both + 80) / (either + 80)).mean()
        return F.binary_cross_entropy_with_logits(logits, truth) + 0.3 * overlap, {"iou": iou(logits, truth)}

    def sample(module: nn.Module, step: int) -> None:
        seen, ids, truth = batch(0, 10)
        found = module(input_ids=ids, pixel_values=seen).logits.sigmoid()
        as_grey = [(m * 2 - 1).unsqueeze(1).expand(-1, 3, -1, -1) for m in (truth, found)]
        sheet([seen, *as_grey], plan.folder / f"sample-{step:06}.png")

    train(plan, model, loss_of, sample)
    save(model, tokenizer, plan.folder / "model")


def save(model: CLIPSegForImageSegmentation, tokenizer: Tokenizer, folder: Path) -> None:
    """A transformers folder, with how pictures and words are read."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def iou(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean intersection over union, at one half, of those pictures that hold the word."""
    found, true = logits.detach() > 0, truth > 0.5
    union = (found | true).sum((1, 2)).clamp(min=1)
    asked = true.any(2).any(1)
    shares = torch.where(asked, (found & true).sum((1, 2)) / union, 0.0)
    return shares.sum() / asked.sum().clamp(min=1)


if __name__ == "__main__":
    main()
