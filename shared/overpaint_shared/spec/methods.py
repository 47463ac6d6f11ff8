"""How the picture is repainted: methods, ControlNets and LoRAs."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from overpaint_shared.errors import Problem
from overpaint_shared.spec.fields import Name, Part, Reference, Share, refuse

GrowMaskBy = Annotated[int, Field(ge=0, le=64)]
Strength = Annotated[float, Field(ge=0, le=10)]


class LoraUse(Part):
    """A LoRA and how strongly it counts."""

    name: Name = Field(description="Name of the LoRA in the registry.")
    weight: float = Field(1.0, ge=-10, le=10, description="How strongly it counts, -10 to 10.")


class _ControlRange(Part):
    """The share of the noise schedule in which a ControlNet acts."""

    strength: Strength = Field(1.0, description="Factor on what the ControlNet adds, 0 to 10.")
    start: Share = Field(0.0, description="Where in the full noise schedule it begins to act, 0 to 1.")
    end: Share = Field(
        1.0, description="Where in the full noise schedule it stops, 0 to 1, not before `start`."
    )

    @model_validator(mode="after")
    def _start_comes_first(self) -> Self:
        if self.start > self.end:
            raise refuse(
                Problem(
                    path="start",
                    message="comes after `end`, so the ControlNet would never act",
                    given=f"{self.start:g}",
                    allowed=f"0 to {self.end:g}",
                )
            )
        return self


class Control(_ControlRange):
    """A ControlNet with its hint; goes with any method."""

    controlnet: Name = Field(description="Name of the ControlNet in the registry.")
    image: Reference = Field(
        description="The hint (edges, depth, ...), made for the canvas; as `source.image`, "
        "at most 4096 characters."
    )


class Img2Img(Part):
    """Basic image to image; a mask only limits what is put back."""

    kind: Literal["img2img"] = Field("img2img", description="Basic image to image.")


class VaeEncodeInpaint(Part):
    """Masked pixels become grey before encoding; made for `denoise` 1."""

    kind: Literal["vae_encode_inpaint"] = Field(
        "vae_encode_inpaint", description="VAE Encode (for Inpainting)."
    )
    grow_mask_by: GrowMaskBy = Field(6, description="How far the noise mask grows, pixels, 0 to 64.")


class LatentNoiseMask(Part):
    """The picture is encoded whole and noise acts only under the mask."""

    kind: Literal["latent_noise_mask"] = Field("latent_noise_mask", description="Set Latent Noise Mask.")


class ControlnetInpaint(_ControlRange):
    """An inpainting ControlNet guides a model that was not trained for inpainting."""

    kind: Literal["controlnet_inpaint"] = Field("controlnet_inpaint", description="ControlNet Inpaint.")
    controlnet: Name = Field(description="Name of the inpainting ControlNet in the registry.")
    latent: Literal["vae_encode_inpaint", "latent_noise_mask"] = Field(
        "vae_encode_inpaint", description="Which method makes the starting latent."
    )
    grow_mask_by: GrowMaskBy = Field(
        6, description="How far the noise mask grows with `vae_encode_inpaint`, pixels, 0 to 64."
    )


class InpaintModel(Part):
    """A model with nine input channels that was trained for inpainting."""

    kind: Literal["inpaint_model"] = Field("inpaint_model", description="A 9-channel inpainting checkpoint.")


Method = Annotated[
    Img2Img | VaeEncodeInpaint | LatentNoiseMask | ControlnetInpaint | InpaintModel,
    Field(discriminator="kind"),
]

DEFAULT_DENOISE: dict[type[Part], float] = {
    Img2Img: 0.6,
    VaeEncodeInpaint: 1.0,
    LatentNoiseMask: 0.8,
    ControlnetInpaint: 1.0,
    InpaintModel: 1.0,
}
"""What `denoise` is when a spec leaves it out."""
