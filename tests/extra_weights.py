"""What goes with the tiny models: LoRAs in two formats, another VAE, a second ControlNet, a merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK, ALPHA, WEIGHT = 4, 2.0, 0.8
"""Of the LoRA `ink`, and how strongly `merged` holds it."""

LAYERS = {
    "unet": [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
        "mid_block.attentions.0.proj_in",  # a convolution of 1 x 1
        "up_blocks.3.resnets.2.conv1",  # a convolution of 3 x 3
    ],
    "text_encoder": [
        "text_model.encoder.layers.0.self_attn.q_proj",
        "text_model.encoder.layers.1.mlp.fc1",
    ],
}

TOML = """
[models.tiny]
family = "sd"
path = "{tiny}/weights/diffusers/sd15"
text_encoder_dtype = "float16"

[models.merged]
family = "sd"
path = "merged"
text_encoder_dtype = "float16"

[models.inpaint]
family = "sd"
path = "{tiny}/weights/diffusers/sd15_inpaint9"
text_encoder_dtype = "float16"

[controlnets.tiny]
path = "{tiny}/weights/diffusers/controlnet"

[controlnets.single]
path = "{tiny}/weights/original/controlnet.safetensors"
config = "{tiny}/config/sd15"

[controlnets.other]
path = "other.safetensors"
config = "{tiny}/config/sd15"

[controlnets.wide]
path = "wide.safetensors"
config = "{tiny}/config/sd15"

[vaes.own]
path = "{tiny}/weights/diffusers/sd15/vae"

[vaes.own-single]
path = "{tiny}/weights/original/sd15.safetensors"
config = "{tiny}/config/sd15"

[vaes.warm]
path = "warm"

[loras.ink]
path = "ink.safetensors"

[loras.ink-peft]
path = "ink-peft.safetensors"

[loras.wash]
path = "wash.safetensors"

[loras.misfit]
path = "misfit.safetensors"
"""


def build(tiny_registry: Path, folder: Path) -> Path:
    """Write it all into `folder` and return its `models.toml`."""
    tiny = tiny_registry.parent
    sd15 = tiny / "weights" / "diffusers" / "sd15"
    changes = _changes(sd15, seed=3)
    save_file(_kohya(changes), folder / "ink.safetensors")
    save_file(_peft(changes), folder / "ink-peft.safetensors", _peft_metadata())
    save_file(_kohya(_changes(sd15, seed=4)), folder / "wash.safetensors")
    nowhere, part = "lora_unet_no_such_layer", torch.zeros(1, 1)
    save_file(
        {f"{nowhere}.lora_down.weight": part, f"{nowhere}.lora_up.weight": part.clone()},
        folder / "misfit.safetensors",
    )
    _merge(sd15, folder / "merged", changes)
    _warm(sd15 / "vae", folder / "warm")
    net = load_file(tiny / "weights" / "original" / "controlnet.safetensors")
    save_file({name: tensor * (0.5 if "zero_convs" in name else 1) for name, tensor in net.items()},
              folder / "other.safetensors")  # fmt: skip
    to_k = "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({**net, to_k: torch.zeros(32, 48)}, folder / "wide.safetensors")
    (folder / "models.toml").write_text(TOML.format(tiny=tiny))
    return folder / "models.toml"


def _weights(folder: Path, network: str) -> dict[str, Tensor]:
    stem = "diffusion_pytorch_model" if network == "unet" else "model"
    return load_file(folder / network / f"{stem}.safetensors")


def _named(weights: dict[str, Tensor], layer: str) -> str:
    """transformers 5.6 laid the text model's parts into the model itself."""
    name = f"{layer}.weight"
    return name if name in weights else name.removeprefix("text_model.")


def _changes(folder: Path, seed: int) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Random down and up weights, large enough to be seen in a picture."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for network, layers in LAYERS.items():
        weights = _weights(folder, network)
        for layer in layers:
            shape = weights[_named(weights, layer)].shape
            tail = (1,) * (len(shape) - 2)
            down = torch.randn(RANK, *shape[1:], generator=generator)
            up = torch.randn(shape[0], RANK, *tail, generator=generator)
            found[network, layer] = (down * 0.15, up * 0.15)
    return found


def _kohya(changes):
    tensors = {}
    for (network, layer), (down, up) in changes.items():
        name = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[network] + layer.replace(".", "_")
        tensors |= {
            f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }  # fmt: skip
    return tensors


def _peft(changes):
    return {
        f"{network}.{layer}.lora_{letter}.weight": tensor.clone()
        for (network, layer), pair in changes.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


def _peft_metadata():
    told = {f"{network}.{key}": value for network in LAYERS for key, value in
            {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {}, "use_dora": False}.items()}  # fmt: skip
    return {"lora_adapter_metadata": json.dumps(told)}


def _merge(source: Path, target: Path, changes) -> None:
    """The model with the LoRA in its weights, as LoRAs are defined: W + weight * alpha / rank * up down."""
    shutil.copytree(source, target)
    for network in LAYERS:
        weights = _weights(source, network)
        if network == "text_encoder":
            weights = {name: tensor.half().float() for name, tensor in weights.items()}
        for (of, layer), (down, up) in changes.items():
            if of == network:
                name = _named(weights, layer)
                delta = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double())
                own = weights[name].double()
                weights[name] = (own + WEIGHT * ALPHA / RANK * delta.view_as(own)).float()
        stem = "diffusion_pytorch_model" if network == "unet" else "model"
        save_file(weights, target / network / f"{stem}.safetensors", {"format": "pt"})


def _warm(source: Path, target: Path) -> None:
    """A VAE that decodes redder."""
    shutil.copytree(source, target)
    path = target / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"] = weights["decoder.conv_out.bias"] + torch.tensor([0.4, 0.0, 0.0])
    save_file(weights, path, {"format": "pt"})
