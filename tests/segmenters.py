"""A tiny CLIPSeg of random weights, and registries with it: it finds something, but nobody knows what."""

import json
from functools import cache
from pathlib import Path

import torch
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

SIDE = 64


def build(folder: Path) -> Path:
    """Write the model's folder: 64 pixels, patches of 8, CLIP's vocabulary, and what shows it pictures."""
    _network().save_pretrained(folder)
    shown = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True, "do_rescale": True, "do_normalize": True,
        "size": {"height": SIDE, "width": SIDE}, "resample": 2,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(shown))
    return folder


@cache
def _network() -> CLIPSegForImageSegmentation:
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPSegConfig(
        text_config={**shared, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
        vision_config={**shared, "image_size": SIDE, "patch_size": 8},
        projection_dim=32, extract_layers=[0, 1], reduce_dim=16, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, conditional_layer=0, use_complex_transposed_convolution=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return CLIPSegForImageSegmentation(config).eval()


def registry(folder: Path, segmenter: Path, models: Path | None = None) -> Path:
    """A `models.toml` with the segmenter `clipseg`, and the entries of another registry."""
    text = f'[segmenters.clipseg]\npath = "{segmenter}"\n'
    if models is not None:
        lines = models.read_text()
        for key in ("path", "config"):
            lines = lines.replace(f'{key} = "', f'{key} = "{models.parent}/')
        text = lines + text
    path = folder / "models.toml"
    path.write_text(text)
    return path
