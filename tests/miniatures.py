"""Models of the miniatures' kind with random weights: small, in half precision, with their own vocabulary."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTextConfig, CLIPTextModel

START, END = 0, 1
WIDTH = 16
SCALING = 0.9
SIDE = 128
"""Of what the segmenter is shown, pixels."""
REGISTRY = """\
[models.mini]
family = "sd"
path = "mini"
defaults = { steps = 3, cfg = 4.0, sampler = "dpmpp_2m", scheduler = "karras", size = 64 }

[models.mini-inpaint]
family = "sd"
path = "mini"
unet = "mini-inpaint/unet"
defaults = { steps = 3, cfg = 4.0, sampler = "dpmpp_2m", scheduler = "karras", size = 64 }

[controlnets.mini-inpaint]
path = "mini-controlnet-inpaint"

[segmenters.mini]
path = "mini-clipseg"
"""
_SCHEDULE = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "num_train_timesteps": 1000, "prediction_type": "epsilon",
}  # fmt: skip
_SHOWN = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
    "size": {"height": SIDE, "width": SIDE}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def build(folder: Path) -> Path:
    """Write the models and their `models.toml`, and return its path."""
    for name, network in _networks().items():
        network.save_pretrained(folder / name)
    for place in ("mini/tokenizer", "mini-clipseg"):
        (folder / place).mkdir(exist_ok=True)
        tokenizer().save(str(folder / place / "tokenizer.json"))
    (folder / "mini/scheduler").mkdir()
    (folder / "mini/scheduler/scheduler_config.json").write_text(json.dumps(_SCHEDULE))
    (folder / "mini-clipseg/preprocessor_config.json").write_text(json.dumps(_SHOWN))
    (folder / "models.toml").write_text(REGISTRY)
    return folder / "models.toml"


@cache
def tokenizer() -> Tokenizer:
    """CLIP's kind, of some 280 tokens: start 0, end 1, bytes, and the few words that it was taught."""
    made = Tokenizer(
        models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    )
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|startoftext|>", "<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), end_of_word_suffix="</w>",
    )  # fmt: skip
    made.train_from_iterator(["a cat and a red hat", *"abcdefghijklmnopqrstuvwxyz"] * 3, trainer)
    return made


@cache
def _networks() -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        unet = _unet(4)
        made = {
            "mini/vae": _vae(),
            "mini/unet": unet,
            "mini/text_encoder": CLIPTextModel(CLIPTextConfig(**_text())),
            "mini-inpaint/unet": _unet(9),
            "mini-controlnet-inpaint": _awake(ControlNetModel.from_unet(unet, conditioning_channels=3)),
            "mini-clipseg": _segmenter(),
        }
    return {name: network.half() for name, network in made.items()}


def _text() -> dict[str, Any]:
    return {
        "vocab_size": tokenizer().get_vocab_size(), "hidden_size": WIDTH, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77,
        "projection_dim": WIDTH, "bos_token_id": START, "eos_token_id": END, "pad_token_id": END,
    }  # fmt: skip


def _unet(channels: int) -> Any:
    """It reads the text from its second level on, as the miniatures do."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(8, 16, 16),
        layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _vae() -> Any:
    """Without attention."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False, scaling_factor=SCALING, force_upcast=False,
    )  # fmt: skip


def _awake(controlnet: Any) -> Any:
    """A new ControlNet adds zeros: nobody would see whether it is used."""
    with torch.no_grad():
        for name, parameter in controlnet.named_parameters():
            if "controlnet" in name:
                parameter.normal_(std=0.1)
    return controlnet


def _segmenter() -> Any:
    shared = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPSegConfig(
        text_config=_text(), vision_config={**shared, "image_size": SIDE, "patch_size": 16},
        projection_dim=WIDTH, extract_layers=[0, 1], reduce_dim=16, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, conditional_layer=0, use_complex_transposed_convolution=False,
    )  # fmt: skip
    return CLIPSegForImageSegmentation(config)
