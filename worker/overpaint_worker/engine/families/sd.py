"""The family `sd`: Stable Diffusion 1.x and 2.x, epsilon and v prediction, and their inpainting models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import torch
from torch import Tensor

from overpaint_shared.catalogue import ModelTraits
from overpaint_shared.errors import ModelLoadError
from overpaint_shared.spec.sampling import ModelDefaults
from overpaint_worker.engine.families import Residuals, Work
from overpaint_worker.engine.families.clip import VOCABULARY, ClipEncoder, ClipText
from overpaint_worker.engine.families.conditioning import Conditioning, network_options
from overpaint_worker.engine.families.controlnet import (
    ControlNet,
    ControlnetFiles,
    load_controlnet,
    survey_controlnet,
)
from overpaint_worker.engine.families.loading import Checkpoint, Layout, Parts, place, read_parts, survey
from overpaint_worker.engine.families.vae import SCALE_FACTOR, Tiling, Vae
from overpaint_worker.engine.families.weights import HashCache, checked_digest
from overpaint_worker.engine.space import DiscreteSpace
from overpaint_worker.registry import ControlnetEntry, ModelEntry, Prediction

if TYPE_CHECKING:
    from overpaint_worker.engine.space import Space

_GREY_LATENT: Final = (0.8223, -0.6876, 0.6364, 0.1380)
"""What Stable Diffusion's own VAE makes of grey, scaled."""
_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _guessed(entry: ModelEntry, width: int, told: Prediction | None) -> str | None:
    """SD 2's two predictions have the same shapes."""
    if width == 1024 and not (entry.prediction or told):
        raise ModelLoadError(
            f"{entry.name}: a Stable Diffusion 2.x file does not say what it predicts",
            field=entry.field("config"),
            fix='write config = "sd21-v" (768 pixel models) or config = "sd21" (512 pixel base)',
        )
    return {768: "sd15", 1024: "sd21"}.get(width)


LAYOUT: Final = Layout(
    title="Stable Diffusion 1.x or 2.x",
    prefixes={
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.",
    },
    folder_context="down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    single_context="model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    guess=_guessed,
)


class SdModel:
    """One Stable Diffusion checkpoint on one device. For one thread: the one that runs the step loop."""

    penultimate: ClassVar[bool] = False
    """Whether its text is what the encoders know before their last layer."""

    def __init__(self, name: str, parts: Parts, space: Space, tiling: Tiling | None = None) -> None:
        self.name = name
        self.space = space
        self.scale_factor = SCALE_FACTOR
        self._unet: Any = parts.unet
        self._vae = Vae(parts.vae, self.device, tiling)
        self._text = ClipText(
            *(ClipEncoder(each, self.device, penultimate=self.penultimate) for each in parts.text_encoders)
        )

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        device: torch.device = self._unet.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        dtype: torch.dtype = self._unet.dtype
        return dtype

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 4."""
        return self._vae.latent_channels

    @property
    def extra_channels(self) -> int:
        """0, or 5 for an inpainting model: the mask, then the masked picture's latent."""
        return int(self._unet.config.in_channels) - self.latent_channels

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """[4, h, w] of a picture of `width` x `height` pixels."""
        return self.latent_channels, height // SCALE_FACTOR, width // SCALE_FACTOR

    def condition(self, prompt: str, *, clip_skip: int = 0) -> Conditioning:
        """{"text": [1, 77 n, D]}. Raises `UnsupportedError`, `JobError`: see `ClipText.condition`."""
        return self._text.condition(prompt, clip_skip)

    def encode(self, px: Tensor) -> Work[Tensor]:
        """See `Vae.encode`."""
        return self._vae.encode(px)

    def decode(self, z: Tensor) -> Work[Tensor]:
        """See `Vae.decode`."""
        return self._vae.decode(z)

    def denoise(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Mapping[str, Tensor],
        residuals: Residuals | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """One pass of R rows, each at its own sigma; see `Model.denoise`.

        The UNet is told integer timesteps and sees `x / sqrt(sigma^2 + 1)`, with `extra` as further channels.
        """
        seen = self.space.scale_input(x, sigma)
        if extra is not None:
            seen = torch.cat([seen, extra.to(seen)], dim=1)
        if seen.shape[1] != self._unet.config.in_channels:
            raise ValueError(f"{self.name} takes {self.extra_channels} extra channels")
        out = self._unet(
            seen.to(self.dtype).contiguous(),
            self.space.timestep(sigma).to(self.device),
            return_dict=False,
            **network_options(conditioning, x, self.dtype),
            **_residual_options(residuals, self.dtype),
        )[0]
        return self.space.denoised(out.to(torch.float32), x, sigma)

    def control(
        self,
        net: ControlNet,
        x: Tensor,
        sigma: Tensor,
        conditioning: Mapping[str, Tensor],
        hints: Tensor,
    ) -> Residuals:
        """See `Model.control`: the net is shown what the UNet is shown, without inpainting channels."""
        seen = self.space.scale_input(x, sigma)
        return net.residuals(seen, self.space.timestep(sigma), conditioning, hints)

    def inpaint_channels(self, z0: Tensor, mask: Tensor | None, masked: Tensor | None) -> Tensor | None:
        """[1, 5, h, w] of an inpainting model: the mask rounded half to even, then the masked latent.

        Without a masked latent the picture's own takes its place; without a mask all is masked: ones, and the
        latent of plain grey.
        """
        if self.extra_channels == 0:
            return None
        if mask is None:
            grey = z0.new_tensor(_GREY_LATENT).view(1, -1, 1, 1).expand_as(z0)
            return torch.cat([torch.ones_like(z0[:, :1]), grey], dim=1)
        return torch.cat([torch.round(mask).to(z0), z0 if masked is None else masked.to(z0)], dim=1)


def _residual_options(residuals: Residuals | None, dtype: torch.dtype) -> dict[str, Any]:
    if residuals is None:
        return {}
    return {
        "down_block_additional_residuals": tuple(tensor.to(dtype) for tensor in residuals.down),
        "mid_block_additional_residual": residuals.mid.to(dtype),
    }


class SdFamily:
    """Loads Stable Diffusion 1.x and 2.x, from diffusers folders and single files."""

    name: ClassVar[str] = "sd"
    layout: ClassVar[Layout] = LAYOUT
    model: ClassVar[type[SdModel]] = SdModel
    size: ClassVar[int] = 512
    """The side that models are trained at, where their entry names none, pixels."""

    def __init__(self, hashes: HashCache | None = None) -> None:
        self._hashes = hashes or HashCache()

    def inspect(self, entry: ModelEntry) -> ModelTraits:
        """What the weights are, without loading them. Hashing takes seconds the first time.

        Raises `ModelLoadError`: something is missing, damaged, a pickle, of another family or another sha256.
        """
        found = survey(entry, self.layout)
        space_of(found)
        return ModelTraits(
            name=entry.name,
            kind="model",
            family=self.name,
            sha256=self._checked_digest(found),
            channels=found.in_channels,
            prediction=found.prediction,
            context_width=found.context_width,
            defaults=self._defaults(entry),
        )

    def _defaults(self, entry: ModelEntry) -> ModelDefaults:
        """The entry's; the family's own size where it names none."""
        said = entry.defaults
        return said if "size" in said.model_fields_set else said.model_copy(update={"size": self.size})

    def load(
        self,
        entry: ModelEntry,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        tiling: Tiling | None = None,
    ) -> SdModel:
        """Read the weights onto `device`; `dtype` None: as the entry says.

        Raises `ModelLoadError`: as `inspect`, or the weights do not fit their configuration.
        """
        found = survey(entry, self.layout)
        self._checked_digest(found)
        where = torch.device(device)
        parts = read_parts(found, dtype or compute_dtype(entry.dtype, where))
        _check_vocabulary(entry, parts)
        if entry.text_encoder_dtype == "float16":
            for encoder in parts.text_encoders:
                encoder.half().float()
        for network in (parts.unet, parts.vae, *parts.text_encoders):
            place(network, where)
        return self.model(entry.name, parts, space_of(found), tiling)

    def inspect_controlnet(self, entry: ControlnetEntry) -> ModelTraits:
        """What a ControlNet's weights are. Raises `ModelLoadError`, as `inspect`."""
        found = survey_controlnet(entry)
        return ModelTraits(
            name=entry.name, kind="controlnet", family=self.name, sha256=self._checked_digest(found),
            context_width=found.context_width,
        )  # fmt: skip

    def load_controlnet(self, entry: ControlnetEntry, device: torch.device | str) -> ControlNet:
        """Read a ControlNet onto `device`. Raises `ModelLoadError`."""
        found = survey_controlnet(entry)
        self._checked_digest(found)
        where = torch.device(device)
        return load_controlnet(found, where, compute_dtype(entry.dtype, where))

    def _checked_digest(self, found: Checkpoint | ControlnetFiles) -> str:
        """Raises `ModelLoadError`: the registry pins another."""
        return checked_digest(self._hashes, found.entry, found.files, single=found.single)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """What a registry's `dtype` means on a device; auto: float32 on a CPU, float16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    return _DTYPES[name]


def space_of(found: Checkpoint) -> DiscreteSpace:
    """The noise levels that the checkpoint was trained on.

    Raises `ModelLoadError`: its schedule is one that this version does not know.
    """
    scheduler = found.scheduler
    schedule = scheduler.get("beta_schedule", "scaled_linear")
    zero_terminal = bool(scheduler.get("rescale_betas_zero_snr", False))
    if schedule != "scaled_linear" or scheduler.get("trained_betas") is not None or zero_terminal:
        kind = "rescale_betas_zero_snr" if zero_terminal else repr(schedule)
        raise ModelLoadError(
            f"{found.entry.name}: it was trained on the noise schedule {kind}",
            field=found.entry.field("path"),
            value=found.entry.path,
            fix="only scaled_linear models can be rendered",
        )
    return DiscreteSpace(
        found.prediction,
        beta_start=float(scheduler.get("beta_start", 0.00085)),
        beta_end=float(scheduler.get("beta_end", 0.012)),
        length=int(scheduler.get("num_train_timesteps", 1000)),
    )


def _check_vocabulary(entry: ModelEntry, parts: Parts) -> None:
    size = min(int(cast("Any", each).config.vocab_size) for each in parts.text_encoders)
    if size < VOCABULARY:
        raise ModelLoadError(
            f"{entry.name}: its text encoder knows {size} tokens, and the tokenizer {VOCABULARY}",
            field=entry.field("path"), value=entry.path, fix="use a model with CLIP's own vocabulary",
        )  # fmt: skip


FAMILY: Final = SdFamily
