"""The family `sd`: Stable Diffusion 1.x and 2.x, epsilon and v prediction, and their inpainting models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Module

from overpaint_shared.catalogue import ModelTraits
from overpaint_shared.errors import ModelLoadError
from overpaint_shared.spec.sampling import ModelDefaults
from overpaint_worker.engine.families import Residuals, Work, finish
from overpaint_worker.engine.families.clip import ClipEncoder, ClipText
from overpaint_worker.engine.families.conditioning import Conditioning, network_options
from overpaint_worker.engine.families.controlnet import (
    ControlNet,
    ControlnetFiles,
    load_controlnet,
    survey_controlnet,
)
from overpaint_worker.engine.families.loading import Parts, place, read_parts
from overpaint_worker.engine.families.overlay import BARE, Networks, Overlay, Uses
from overpaint_worker.engine.families.survey import Checkpoint, Layout, survey
from overpaint_worker.engine.families.vae import SCALE_FACTOR, Tiling, Vae
from overpaint_worker.engine.families.vae_files import VaeFiles, load_vae, overflows, survey_vae
from overpaint_worker.engine.families.weights import HashCache, checked_digest
from overpaint_worker.engine.space import DiscreteSpace
from overpaint_worker.registry import ControlnetEntry, ModelEntry, Prediction, VaeEntry

if TYPE_CHECKING:
    from overpaint_worker.engine.space import Space

KEPT_ADAPTED: Final = 4
"""Sets of LoRAs whose weights are kept; those of jobs under way are kept beyond that."""
_ROUNDED: Final = {"text_encoder": torch.float16, "text_encoder_2": torch.float16}
_GREY_LATENT: Final = (0.8223, -0.6876, 0.6364, 0.1380)
"""What Stable Diffusion's own VAE makes of grey, scaled; the reference takes it for SDXL, too."""
_THEIR_SCALINGS: Final = (0.18215, 0.13025)
"""The scaling factors of those VAEs; one of another factor is another VAE, and is asked."""
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
    single_context="model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    guess=_guessed,
)


class SdModel:
    """One Stable Diffusion checkpoint on one device. For one thread: the one that runs the step loop."""

    penultimate: ClassVar[bool] = False
    """Whether its text is what the encoders know before their last layer."""

    def __init__(
        self,
        name: str,
        parts: Parts,
        space: Space,
        tiling: Tiling | None = None,
        *,
        half_text: bool = False,
    ) -> None:
        """`half_text`: the text encoders' weights are rounded to half precision."""
        self.name = name
        self.space = space
        self.scale_factor = SCALE_FACTOR
        self._unet: Any = parts.unet
        self._vae = Vae(parts.vae, self.device, tiling)
        self._known_grey = cast("Any", parts.vae).config.scaling_factor in _THEIR_SCALINGS
        self._encoders = [
            ClipEncoder(encoder, vocabulary, self.device, penultimate=self.penultimate)
            for encoder, vocabulary in zip(parts.text_encoders, parts.vocabularies, strict=True)
        ]
        self._text = ClipText(*self._encoders)
        self._networks = Networks(_by_name(parts), _ROUNDED if half_text else {})
        self._overlay = BARE
        self._kept: OrderedDict[Hashable, SdModel] = OrderedDict()
        self._adapted: WeakValueDictionary[Hashable, SdModel] = WeakValueDictionary()

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
        self._networks.use(self._overlay)
        return self._text.condition(prompt, clip_skip)

    def adapted(self, uses: Uses) -> SdModel:
        """The model with LoRAs laid over its UNet and its text encoders; see `Model.adapted`."""
        counting = [(lora, weight) for lora, weight in uses if weight != 0]
        if not counting:
            return self
        key = tuple((lora.sha256, weight) for lora, weight in counting)
        found = self._adapted.get(key) or self._with(self._networks.overlay(counting))
        self._adapted[key] = self._kept[key] = found
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_ADAPTED:
            self._kept.popitem(last=False)
        return found

    def _with(self, overlay: Overlay) -> SdModel:
        """The same networks, with prompts of its own."""
        other = copy(self)
        other._overlay, other._text = overlay, ClipText(*self._encoders)  # noqa: SLF001 - of its own kind
        other._kept, other._adapted = OrderedDict(), WeakValueDictionary()  # noqa: SLF001 - no cycles
        return other

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
        times, sigma = _on_device(self.space.timestep(sigma), sigma, x.device)
        seen = self.space.scale_input(x, sigma)
        if extra is not None:
            seen = torch.cat([seen, extra.to(seen)], dim=1)
        if seen.shape[1] != self._unet.config.in_channels:
            raise ValueError(f"{self.name} takes {self.extra_channels} extra channels")
        self._networks.use(self._overlay)
        out = self._unet(
            seen.to(self.dtype).contiguous(),
            times,
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
            return torch.cat([torch.ones_like(z0[:, :1]), self._grey(z0)], dim=1)
        return torch.cat([torch.round(mask).to(z0), z0 if masked is None else masked.to(z0)], dim=1)

    def _grey(self, z0: Tensor) -> Tensor:
        """The latent of a plain grey picture, of the shape of `z0`."""
        if self._known_grey:
            return z0.new_tensor(_GREY_LATENT).view(1, -1, 1, 1).expand_as(z0)
        height, width = (side * SCALE_FACTOR for side in z0.shape[-2:])
        return finish(self._vae.encode(torch.full((1, 3, height, width), 0.5))).to(z0)


def _on_device(times: Tensor, sigma: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Times (whole numbers below 2^24, which float32 holds) and sigmas [R] in one copy: each waits."""
    both = torch.stack([times.to(torch.float32), sigma.to(times.device)]).to(device)
    return both[0].to(torch.int64), both[1]


def _by_name(parts: Parts) -> dict[str, Module]:
    """The networks that LoRAs change, as LoRA files call them."""
    names = ("text_encoder", "text_encoder_2")
    return {"unet": parts.unet, **dict(zip(names, parts.text_encoders, strict=False))}


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
    vae_config: ClassVar[str] = "sd15"
    """The shipped configuration that single VAE files are read as."""

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
        if entry.text_encoder_dtype == "float16":
            for encoder in parts.text_encoders:
                encoder.half().float()
        for network in (parts.unet, parts.vae, *parts.text_encoders):
            place(network, where)
        half_text = entry.text_encoder_dtype == "float16"
        return self.model(entry.name, parts, space_of(found), tiling, half_text=half_text)

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

    def inspect_vae(self, entry: VaeEntry) -> ModelTraits:
        """What a VAE's weights are. Raises `ModelLoadError`, as `inspect`."""
        digest = self._checked_digest(survey_vae(entry, self.vae_config))
        return ModelTraits(name=entry.name, kind="vae", family=self.name, sha256=digest)

    def load_vae(self, entry: VaeEntry, device: torch.device | str) -> Vae:
        """Read a VAE onto `device`. Raises `ModelLoadError`."""
        found = survey_vae(entry, self.vae_config)
        self._checked_digest(found)
        where = torch.device(device)
        dtype = compute_dtype(entry.dtype, where)
        careful = dtype == torch.float16 and self.layout.careful_vae and overflows(found)
        return load_vae(found, where, torch.float32 if careful else dtype)

    def _checked_digest(self, found: Checkpoint | ControlnetFiles | VaeFiles) -> str:
        """Raises `ModelLoadError`: the registry pins another."""
        alone = found.single and len(found.files) == 1
        return checked_digest(self._hashes, found.entry, found.files, single=alone)


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


FAMILY: Final = SdFamily
