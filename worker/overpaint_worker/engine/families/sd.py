"""The family `sd`: Stable Diffusion 1.x and 2.x, epsilon and v prediction, and their inpainting models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor
from torch.nn import Module

from overpaint_shared.catalogue import ModelTraits
from overpaint_shared.errors import ModelLoadError
from overpaint_worker.engine.families import Residuals, Work
from overpaint_worker.engine.families.clip import VOCABULARY, ClipText
from overpaint_worker.engine.families.conditioning import TEXT, Conditioning
from overpaint_worker.engine.families.loading import Checkpoint, Parts, read_parts, survey
from overpaint_worker.engine.families.vae import SCALE_FACTOR, Tiling, Vae
from overpaint_worker.engine.families.weights import HashCache
from overpaint_worker.engine.space import DiscreteSpace
from overpaint_worker.registry import ModelEntry

if TYPE_CHECKING:
    from overpaint_worker.engine.space import Space

_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class SdModel:
    """One Stable Diffusion checkpoint on one device. For one thread: the one that runs the step loop."""

    def __init__(self, name: str, parts: Parts, space: Space, tiling: Tiling | None = None) -> None:
        self.name = name
        self.space = space
        self.scale_factor = SCALE_FACTOR
        self._unet: Any = parts.unet
        self._vae = Vae(parts.vae, self.device, tiling)
        self._text = ClipText(parts.text_encoder, self.device)

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
            encoder_hidden_states=conditioning[TEXT].to(self.dtype),
            return_dict=False,
            **_residual_options(residuals, self.dtype),
        )[0]
        return self.space.denoised(out.to(torch.float32), x, sigma)


def _residual_options(residuals: Residuals | None, dtype: torch.dtype) -> dict[str, Any]:
    if residuals is None:
        return {}
    return {
        "down_block_additional_residuals": tuple(tensor.to(dtype) for tensor in residuals.down),
        "mid_block_additional_residual": residuals.mid.to(dtype),
    }


class SdFamily:
    """Loads Stable Diffusion 1.x and 2.x, from diffusers folders and single files."""

    name = "sd"

    def __init__(self, hashes: HashCache | None = None) -> None:
        self._hashes = hashes or HashCache()

    def inspect(self, entry: ModelEntry) -> ModelTraits:
        """What the weights are, without loading them. Hashing takes seconds the first time.

        Raises `ModelLoadError`: something is missing, damaged, a pickle, of another family or another sha256.
        """
        found = survey(entry)
        space_of(found)
        return ModelTraits(
            name=entry.name,
            kind="model",
            family=self.name,
            sha256=self._checked_digest(found),
            channels=found.in_channels,
            prediction=found.prediction,
            context_width=found.context_width,
            defaults=entry.defaults,
        )

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
        found = survey(entry)
        self._checked_digest(found)
        place = torch.device(device)
        parts = read_parts(found, dtype or compute_dtype(entry.dtype, place))
        _check_vocabulary(entry, parts)
        if entry.text_encoder_dtype == "float16":
            parts.text_encoder.half().float()
        for network in (parts.unet, parts.vae, parts.text_encoder):
            _place(network, place)
        return SdModel(entry.name, parts, space_of(found), tiling)

    def _checked_digest(self, found: Checkpoint) -> str:
        """The file's own digest, or a folder's: that of the lines that `sha256sum` prints for its weights."""
        digest = self._hashes.sha256(found.root) if found.single else self._hashes.digest(found.files)
        wanted = found.entry.sha256
        if wanted not in (None, digest):
            raise ModelLoadError(
                f"{found.entry.name}: the registry pins other weights; the sha256 of these is {digest}",
                field=found.entry.field("sha256"),
                value=wanted,
                fix="fetch the right weights, or correct sha256",
            )
        return digest


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


def _place(network: Module, device: torch.device) -> None:
    """Move the weights, on a CPU too: out of the mapped file and into memory of their own.

    In the file they lie at odd addresses, where some kernels sum in another order, so that the same weights
    from another layout would give other bits. Nor may a file that is replaced pull them away.
    """
    if device.type != "cpu":
        network.to(device)
        return
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.clone()


def _check_vocabulary(entry: ModelEntry, parts: Parts) -> None:
    size = int(cast("Any", parts.text_encoder).config.vocab_size)
    if size < VOCABULARY:
        raise ModelLoadError(
            f"{entry.name}: its text encoder knows {size} tokens, and the tokenizer {VOCABULARY}",
            field=entry.field("path"), value=entry.path, fix="use a model with CLIP's own vocabulary",
        )  # fmt: skip
