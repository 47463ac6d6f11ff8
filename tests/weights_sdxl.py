"""Tiny weights of the SDXL architecture: random, seeded, in both layouts; built once per user and version.

The original layout's names are derived here by hand, from the published checkpoints' lists of names, so that
what reads them is held against something else than its own table.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.weights import build_tiny_registry, cached, copy_json

WIDTHS = (32, 48)
"""Of the two text encoders."""
POOLED = 40
TIME = 8
"""Features of each of the six sizes."""
SCALING = 0.13025

MODELS_TOML = """\
[models.xl]
family = "sdxl"
path = "xl"

[models.xl-single]
family = "sdxl"
path = "xl.safetensors"
config = "config"

[models.xl-inpaint]
family = "sdxl"
path = "xl-inpaint"

[models.xl-inpaint-single]
family = "sdxl"
path = "xl-inpaint.safetensors"
config = "config"

[controlnets.xl]
family = "sdxl"
path = "xl-controlnet"

[controlnets.xl-single]
family = "sdxl"
path = "xl-controlnet.safetensors"
config = "config"
"""


def build_sdxl_registry() -> Path:
    """Build the weights if this user has none of this version yet, and return their `models.toml`."""
    source = Path(__file__).read_bytes()
    versions = "".join(f"{name}=={version(name)};" for name in ("torch", "diffusers", "transformers"))
    tiny = build_tiny_registry().parent / "weights/diffusers/sd15"
    key = hashlib.sha256(source + versions.encode() + str(tiny).encode()).hexdigest()[:16]
    return cached(f"tiny-sdxl-{key}", lambda folder: _build(folder, tiny)) / "models.toml"


def _build(folder: Path, tiny: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as name:
        result = Path(name) / "result"
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(2024)
            _write(result)
        copy_json(result / "xl", result / "config")
        (result / "models.toml").write_text(f'{MODELS_TOML}\n[models.tiny]\nfamily = "sd"\npath = "{tiny}"\n')
        result.rename(folder)


def _write(root: Path) -> None:
    unet, vae, first, second = _unet(4), _vae(), _text(0), _text(1)
    others = {
        **_prefixed("first_stage_model.", _original_vae(vae.state_dict())),
        **_prefixed("conditioner.embedders.0.transformer.text_model.", _bare(first)),
        **_prefixed("conditioner.embedders.1.model.", _open_clip(second)),
    }
    for name, denoiser in {"xl": unet, "xl-inpaint": _unet(9)}.items():
        parts = {"unet": denoiser, "vae": vae, "text_encoder": first, "text_encoder_2": second}
        for part, network in parts.items():
            network.save_pretrained(root / name / part)
        EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ).save_pretrained(root / name / "scheduler")
        named = _prefixed("model.diffusion_model.", _original_unet(denoiser.state_dict()))
        save_file({**named, **others}, root / f"{name}.safetensors")
    control = ControlNetModel.from_unet(unet)
    for name, parameter in control.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")) or "conv_out" in name:
            parameter.normal_(std=0.1)  # a fresh ControlNet adds nothing
    control.save_pretrained(root / "xl-controlnet")
    save_file(_prefixed("control_model.", _original_controlnet(control)), root / "xl-controlnet.safetensors")


def _unet(channels: int) -> UNet2DConditionModel:
    return _calibrated(
        UNet2DConditionModel(
            in_channels=channels,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
            cross_attention_dim=sum(WIDTHS),
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME,
            projection_class_embeddings_input_dim=POOLED + 6 * TIME,
        ).eval()
    )


def _calibrated(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Its answer to noise has the spread of noise, and its text and sizes weigh."""
    unet.add_embedding.linear_2.weight.mul_(5)
    for name, parameter in unet.named_parameters():
        if name.endswith("attn2.to_out.0.weight"):
            parameter.mul_(3)
    out = unet(
        torch.randn(1, unet.config.in_channels, 16, 16),
        500,
        encoder_hidden_states=torch.randn(1, 77, sum(WIDTHS)),
        added_cond_kwargs={"text_embeds": torch.randn(1, POOLED), "time_ids": torch.full((1, 6), 128.0)},
    ).sample
    unet.conv_out.weight.div_(out.std())
    return unet


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=SCALING,
        force_upcast=True,
    ).eval()
    picture = torch.nn.functional.interpolate(torch.randn(1, 3, 8, 8), size=(64, 64), mode="bicubic")
    means = vae.encode(picture).latent_dist.mode()
    vae.quant_conv.weight.div_(means.std() * SCALING)
    vae.quant_conv.bias.div_(means.std() * SCALING)
    vae.decoder.conv_out.weight.mul_(0.4 / vae.decode(vae.encode(picture).latent_dist.mode()).sample.std())
    return vae


def _text(which: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        hidden_size=WIDTHS[which],
        intermediate_size=64,
        num_hidden_layers=(3, 4)[which],
        num_attention_heads=4,
        hidden_act=("quick_gelu", "gelu")[which],
        projection_dim=POOLED,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    encoder = (CLIPTextModel, CLIPTextModelWithProjection)[which](config).eval()
    for name, parameter in encoder.named_parameters():
        if "embedding" in name or "proj" in name or "fc" in name:
            parameter.normal_(std=0.2)
    return encoder


# --- the original layout's names


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor.clone().contiguous() for name, tensor in tensors.items()}


_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _original_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = original_names(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def original_names(names: Iterable[str]) -> dict[str, str]:
    """What the original layout calls these tensors of a UNet, all of it."""
    attending = {name.split(".attentions.")[0] for name in names if ".attentions." in name}
    return {name: _unet_name(name, attending) for name in names}


def _unet_name(name: str, attending: set[str]) -> str:
    for ours, theirs in _ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, place, *tail = rest
        index = 1 if kind == "attentions" else 2 * int(place)
        return f"middle_block.{index}.{_layer(kind, tail)}"
    level, kind, place, *tail = rest
    if kind == "downsamplers":
        return f"input_blocks.{3 * int(level) + 3}.0.op.{tail[-1]}"
    if kind == "upsamplers":
        column = 2 if f"up_blocks.{level}" in attending else 1
        return f"output_blocks.{3 * int(level) + 2}.{column}.conv.{tail[-1]}"
    column = int(kind == "attentions")
    block = 3 * int(level) + int(place)
    table = f"input_blocks.{block + 1}" if side == "down_blocks" else f"output_blocks.{block}"
    return f"{table}.{column}.{_layer(kind, tail)}"


def _layer(kind: str, tail: list[str]) -> str:
    return ".".join([_RESIDUAL[tail[0]], *tail[1:]] if kind == "resnets" else tail)


def _original_controlnet(control: ControlNetModel) -> dict[str, Tensor]:
    attending = {name.split(".attentions.")[0] for name in control.state_dict() if ".attentions." in name}
    hints = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    ends = {
        **{
            f"controlnet_cond_embedding.{name}.": f"input_hint_block.{2 * i}." for i, name in enumerate(hints)
        },
        **{f"controlnet_down_blocks.{i}.": f"zero_convs.{i}.0." for i in range(9)},
        "controlnet_mid_block.": "middle_block_out.0.",
    }
    found = {}
    for name, tensor in control.state_dict().items():
        end = next((end for end in ends if name.startswith(end)), None)
        found[ends[end] + name.removeprefix(end) if end else _unet_name(name, attending)] = tensor
    return found


_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _original_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0." in new:
            head, tail = new.split("mid_block.attentions.0.")
            layer, kind = tail.rsplit(".", 1)
            new = f"{head}mid.attn_1.{_ATTENTION[layer]}.{kind}"
            if kind == "weight" and layer != "group_norm":
                found[new] = tensor[:, :, None, None]  # a convolution of one pixel there
                continue
        found[new] = tensor
    return found


def _bare(encoder: torch.nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "self_attn": "attn",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _open_clip(encoder: torch.nn.Module) -> dict[str, Tensor]:
    """Query, key and value are one tensor there, and the projection lies on its side."""
    found: dict[str, Tensor] = {}
    weights = _bare(encoder)
    for name, tensor in weights.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif ".q_proj." in name:
            fused = torch.cat([weights[name.replace(".q_", f".{part}_")] for part in "qkv"])
            found[_open_clip_name(name).replace("q_proj.", "in_proj_")] = fused
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[_open_clip_name(name)] = tensor
    return found


def _open_clip_name(name: str) -> str:
    for ours, theirs in _OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name
