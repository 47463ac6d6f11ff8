"""Tiny Stable Diffusion weights for demonstrations: built by arithmetic in a second, trained on nothing.

    python -m overpaint_worker.engine.tiny_weights FOLDER

writes a diffusers folder (UNet, VAE, text encoder, schedule) that a worker loads like any real checkpoint.
Random weights would turn every picture into noise, so part of each network is set by hand:

* The VAE carries the mean colour of each block of 8 x 8 pixels to the latent and smoothly back.
* The UNet's estimate of the noise is what differs from the surroundings: e = A (x - x2) + B (x2 - x4), where
  x2 and x4 are x at half and at a quarter of the size. It removes noise, and detail with it, as a blur would.
* To this it adds faint random features of the latent, the step and the text: its "imagination".

So a picture stays recognisable, ever less with more denoise. It follows no prompt, for it knows no words.

How a number passes a GroupNorm unharmed: four channels of one group hold (v, -v, K, -K) with K much larger
than v. Their mean is 0 and their spread K / sqrt(2), whatever the picture, to a relative (v / K)^2. SiLU is
undone by the pair as well: silu(v) - silu(-v) = v.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

SEED: Final = 20
WIDTH: Final = 32
"""Channels of every layer."""
GROUPS: Final = 8
LATENTS: Final = 4
CARRIED: Final = 4 * LATENTS
"""Channels that carry values by hand, (v, -v, K, -K) for each of four; the others are random."""
PIXEL_K: Final = 12.0
LATENT_K: Final = 100.0
"""K for values of about 1 (pixels, -1..1) and of about 5 (latents): a relative error below 1 %."""
LATENT_GAIN: Final = 10.0
"""Latent per pixel value. The latents' spread of about 5 sets how much noise it takes to hide a picture."""
NOISY: Final = 800
"""A step late in the schedule (of 1000), where the estimate must lean to no colour."""
SCALING: Final = 0.18215
"""What pipelines multiply the VAE's latents by: as for Stable Diffusion 1.x."""
FINE: Final = 1.0
COARSE: Final = 0.6
"""A and B above."""
IMAGINATION: Final = 0.12
"""Size of the random part of the estimate, per feature."""
LUMA: Final = (1 / 3, 1 / 3, 1 / 3)


def main(argv: list[str]) -> None:
    """Write the weights to the folder that `argv[1]` names."""
    build(Path(argv[1]))


@torch.no_grad()
def build(folder: Path) -> None:
    """Write a diffusers folder of float32 weights, the same on every machine: about 9 MB."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        parts: dict[str, Any] = {"unet": _unet(), "vae": _vae(), "text_encoder": _text_encoder()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(_SCHEDULE, indent=1))


_SCHEDULE: Final = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def _text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return CLIPTextModel(config)


def _vae() -> Any:
    vae: Any = AutoencoderKL(
        latent_channels=LATENTS,
        block_out_channels=(WIDTH,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        scaling_factor=SCALING,
    )
    _carry(vae, shrink=(0, 1), grow=(0.25, 0.5, 0.25))
    gain = LATENT_GAIN / SCALING
    colours = torch.cat([torch.eye(3), torch.tensor([LUMA])])
    _enter(vae.encoder.conv_in, colours, PIXEL_K)
    _leave(vae.encoder.conv_norm_out, vae.encoder.conv_out, torch.eye(2 * LATENTS, LATENTS), PIXEL_K)
    _pointwise(vae.quant_conv, torch.eye(2 * LATENTS) * gain)
    vae.quant_conv.bias[LATENTS:] = -30.0  # log variance: the latent is certain
    _pointwise(vae.post_quant_conv, torch.eye(LATENTS) / gain)
    _enter(vae.decoder.conv_in, torch.eye(LATENTS), PIXEL_K)
    _leave(vae.decoder.conv_norm_out, vae.decoder.conv_out, torch.eye(3, LATENTS), PIXEL_K)
    return vae


def _unet() -> Any:
    unet: Any = UNet2DConditionModel(
        sample_size=48,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=(WIDTH,) * 3,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        # Every place attending to every other would cost more than all the rest.
        only_cross_attention=(True, False, False),
        layers_per_block=1,
        norm_num_groups=GROUPS,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    _carry(unet, shrink=(1, 2), grow=(0.25, 0.5, 0.25))
    _enter(unet.conv_in, torch.eye(LATENTS), LATENT_K)
    # The last block of each level meets the skip connection from the same level's beginning: x2, then x.
    up = unet.up_blocks
    _meet(up[1].resnets[-1], below=COARSE, skip=FINE - COARSE)
    _meet(up[2].resnets[-1], below=-1.0, skip=FINE)
    imagined = torch.randn(LATENTS, WIDTH - CARRIED) * IMAGINATION
    _leave(unet.conv_norm_out, unet.conv_out, torch.eye(LATENTS), LATENT_K)
    unet.conv_out.weight[:, CARRIED:, 1, 1] = imagined
    unet.conv_out.bias[:] = -_tint(unet)
    return unet


def _tint(unet: Any) -> Tensor:
    """The mean [LATENTS] of the UNet's estimate in pure noise: a colour that every step would add."""
    noise, no_text = torch.randn(1, LATENTS, 48, 48), torch.zeros(1, 77, WIDTH)
    estimate: Tensor = unet(noise, NOISY, encoder_hidden_states=no_text).sample
    return estimate.mean((0, 2, 3))


def _carry(network: nn.Module, *, shrink: tuple[int, int], grow: tuple[float, float, float]) -> None:
    """Make every block pass the carried channels on: averaged over 2 x 2 where it halves the size.

    `shrink`: which two taps of its 3 x 3 kernel lie on the picture; `grow`: the blur after doubling the size.
    """
    block: Any
    for block in network.modules():
        if isinstance(block, ResnetBlock2D):
            _silence(block.conv2)
            if block.conv_shortcut is not None:
                _silence(block.conv_shortcut)
                _diagonal(block.conv_shortcut.weight)[:, 0, 0] = 1.0
        elif isinstance(block, Transformer2DModel):
            _silence(block.proj_out)
        elif isinstance(block, Attention) and block.residual_connection:
            _silence(block.to_out[0])
        elif isinstance(block, Downsample2D):
            _silence(block.conv)
            first, last = shrink
            _diagonal(block.conv.weight)[:, first : last + 1, first : last + 1] = 0.25
        elif isinstance(block, Upsample2D) and block.conv is not None:
            _silence(block.conv)
            _diagonal(block.conv.weight)[:] = torch.outer(torch.tensor(grow), torch.tensor(grow))


def _silence(layer: Any) -> None:
    """Let nothing into the carried channels."""
    layer.weight[:CARRIED] = 0.0
    if layer.bias is not None:
        layer.bias[:CARRIED] = 0.0


def _diagonal(weight: Tensor) -> Tensor:
    """The kernels [CARRIED, kh, kw] from each carried channel to itself, a view."""
    return weight[:CARRIED, :CARRIED].diagonal(dim1=0, dim2=1).permute(2, 0, 1)


def _enter(layer: Any, mix: Tensor, k: float) -> None:
    """Begin the four channels (v, -v, K, -K) of each value v = mix @ input. mix [values, inputs]."""
    _silence(layer)
    for value, row in enumerate(mix):
        at = 4 * value
        layer.weight[at, :, 1, 1] = row
        layer.weight[at + 1, :, 1, 1] = -row
        layer.bias[at + 2] = k
        layer.bias[at + 3] = -k


def _leave(norm: Any, layer: Any, mix: Tensor, k: float) -> None:
    """End with output = mix @ values, after `norm` and SiLU. mix [outputs, values]."""
    norm.weight[:CARRIED] = k / 2**0.5  # undoes the division by the group's spread
    norm.bias[:CARRIED] = 0.0
    layer.weight[:] = 0.0
    layer.bias[:] = 0.0
    layer.weight[:, 0:CARRIED:4, 1, 1] = mix
    layer.weight[:, 1:CARRIED:4, 1, 1] = -mix


def _meet(block: Any, *, below: float, skip: float) -> None:
    """Join what comes from the level below (channels 0 to WIDTH) and the skip connection (the rest)."""
    weight = block.conv_shortcut.weight
    for value in range(0, CARRIED, 4):
        for channel in (value, value + 1):
            weight[channel, channel] = below
            weight[channel, WIDTH + channel] = skip


def _pointwise(layer: Any, mix: Tensor) -> None:
    layer.weight[:] = mix[:, :, None, None]
    layer.bias[:] = 0.0


if __name__ == "__main__":
    main(sys.argv)
