"""Train the miniature's `CLIPSegForImageSegmentation`: a word to where it is. Knows nothing of the VAE.

`python -m deploy.miniatures.segmenter --out DIR`. Words that are not in the picture are asked too, so that
"nothing here" is an answer it can give.
"""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from deploy.miniatures import words, world
from deploy.miniatures.training import COUNT, parse_plan, pixels, sheet, signed, train

BATCH, WIDTH, LENGTH = 16, 96, 77
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
    """The untrained network: 128 pixels, patches of 8, four layers of width 96 on either side."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    config = CLIPSegConfig(
        text_config={
            **shared, "num_hidden_layers": 2, "vocab_size": vocabulary, "max_position_embeddings": LENGTH,
            "bos_token_id": 0, "eos_token_id": end, "pad_token_id": end,
        },
        vision_config={**shared, "num_hidden_layers": 4, "image_size": world.SIZE, "patch_size": 8},
        projection_dim=WIDTH, extract_layers=[1, 2, 3], reduce_dim=48, decoder_num_attention_heads=4,
        decoder_intermediate_size=192, conditional_layer=0, use_complex_transposed_convolution=False,
    )  # fmt: skip
    return CLIPSegForImageSegmentation(config)


def question(dice: random.Random, masks: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """A wording of a word, and where that word is [128, 128], 0..1; three in ten words are absent."""
    if dice.random() < 0.3:
        word = dice.choice([w for w in world.OBJECTS if w not in masks])
        mask = np.zeros((world.SIZE, world.SIZE), np.float32)
    else:
        word = dice.choice(list(masks))
        mask = masks[word].astype(np.float32) / 255
    return dice.choice(WORDINGS).format(word, world.article(word)), mask


def main() -> None:
    """Train, from the check point where there is one."""
    plan = parse_plan("segmenter", steps=5_000, rate=1.5e-3)
    data, tokenizer = pixels(plan.out), words.load(plan.out / "tokenizer")
    model = build(tokenizer.get_vocab_size(), tokenizer.token_to_id(words.END)).to(plan.device)

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        dice = random.Random(step)
        chosen = [dice.randrange(COUNT) for _ in range(BATCH)]
        asked = [question(dice, world.scene(number).masks) for number in chosen]
        ids = torch.tensor([words.encode(tokenizer, text) for text, _ in asked]).to(plan.device)
        truth = torch.from_numpy(np.stack([mask for _, mask in asked])).to(plan.device)
        return signed(data[sorted(chosen)][np.argsort(np.argsort(chosen))], plan.device), ids, truth

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        seen, ids, truth = batch(step)
        logits = model(input_ids=ids, pixel_values=seen).logits.float()
        likely = logits.sigmoid()
        overlap = (likely * truth).sum((1, 2)), (likely + truth).sum((1, 2))
        dice = 1 - (2 * overlap[0] + 20) / (overlap[1] + 20)
        return F.binary_cross_entropy_with_logits(logits, truth) + 0.3 * dice.mean(), {
            "iou": iou(logits, truth)
        }

    def sample(module: nn.Module, step: int) -> None:
        seen, ids, truth = batch(10**6)
        found = module(input_ids=ids, pixel_values=seen).logits.sigmoid()
        as_grey = [(m * 2 - 1).unsqueeze(1).expand(-1, 3, -1, -1) for m in (truth, found)]
        sheet([seen, *as_grey], plan.folder / f"sample-{step:06}.png")

    train(plan, model, loss_of, sample)
    model.save_pretrained(plan.folder / "model")
    (plan.folder / "model" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
    tokenizer.save(str(plan.folder / "model" / "tokenizer.json"))


def iou(logits: Tensor, truth: Tensor) -> float:
    """Mean intersection over union, at one half, of those pictures that hold the word."""
    found, true = logits.detach() > 0, truth > 0.5
    union = (found | true).sum((1, 2))
    asked = true.any(2).any(1)
    return (
        float(((found & true).sum((1, 2)) / union.clamp(min=1))[asked].mean()) if bool(asked.any()) else 0.0
    )


if __name__ == "__main__":
    main()
