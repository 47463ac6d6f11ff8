"""The family `sdxl`: Stable Diffusion XL, base and inpainting models.

It differs from `sd` in its text: two encoders side by side, both read before their last layer, a pooled text
from the second, and the sizes of the picture (see `network_options`). Everything else is shared.
"""

from __future__ import annotations

from typing import ClassVar, Final

from overpaint_worker.engine.families.sd import SdFamily, SdModel
from overpaint_worker.engine.families.survey import Layout
from overpaint_worker.registry import ModelEntry, Prediction

WIDTH: Final = 2048
"""Of the text: 768 from the first encoder, 1280 from the second."""


def _guessed(_entry: ModelEntry, width: int, _told: Prediction | None) -> str | None:
    return "sdxl" if width == WIDTH else None


LAYOUT: Final = Layout(
    title="Stable Diffusion XL",
    prefixes={
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    single_context="model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
    guess=_guessed,
    careful_vae=True,
)


class SdxlModel(SdModel):
    """One Stable Diffusion XL checkpoint on one device."""

    penultimate: ClassVar[bool] = True


class SdxlFamily(SdFamily):
    """Loads Stable Diffusion XL, from diffusers folders and single files."""

    name: ClassVar[str] = "sdxl"
    layout: ClassVar[Layout] = LAYOUT
    model: ClassVar[type[SdModel]] = SdxlModel
    size: ClassVar[int] = 1024
    vae_config: ClassVar[str] = "sdxl"


FAMILY: Final = SdxlFamily
