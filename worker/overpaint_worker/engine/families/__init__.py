"""Families: how text, pictures and latents go in and out of one kind of model.

One file per family (`sd.py`), found by name through `family`. Methods and the loop see only the protocols
here. All latents that cross this seam are **scaled** (the VAE's units times its scaling factor), float32, on
the model's device; pictures are float32 [1, 3, H, W] in 0..1.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from overpaint_shared.errors import UnsupportedError
from overpaint_worker.engine.families.conditioning import Conditioning
from overpaint_worker.registry import FamilyName

if TYPE_CHECKING:
    from overpaint_shared.catalogue import ModelTraits
    from overpaint_worker.engine.families.controlnet import ControlNet
    from overpaint_worker.engine.families.overlay import Uses
    from overpaint_worker.engine.families.weights import HashCache
    from overpaint_worker.engine.space import Space
    from overpaint_worker.registry import ControlnetEntry, ModelEntry, VaeEntry

__all__ = ["Coder", "Conditioning", "Family", "Model", "Residuals", "Work", "family", "finish"]

T = TypeVar("T")
Work = Generator[None, None, T]
"""Work in units: each `next` does one unit, and the generator's return value is the result. The caller
decides what happens between two units, so that a large picture never stalls the step loop."""


def finish(work: Work[T]) -> T:
    """Do all units at once and return the result: for callers that have nothing else to run."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            result: T = stop.value
            return result


@dataclass(frozen=True, slots=True)
class Residuals:
    """What ControlNets add to a denoiser, summed and weighted; every tensor has the pass's rows first.

    A row without a ControlNet holds zeros, which changes nothing, bit for bit.
    """

    down: tuple[Tensor, ...]
    mid: Tensor

    def row(self, i: int) -> Residuals:
        """Those of one row, the rows' dimension kept; no copies."""
        return Residuals(tuple(tensor[i : i + 1] for tensor in self.down), self.mid[i : i + 1])


class Coder(Protocol):
    """Pictures to latents and back: a model's own VAE, or another."""

    def encode(self, px: Tensor) -> Work[Tensor]:
        """Picture [1, 3, H, W] in 0..1 -> latent [1, C, h, w]: the mean of the posterior, never a sample."""
        ...

    def decode(self, z: Tensor) -> Work[Tensor]:
        """Latent [1, C, h, w] -> picture [1, 3, H, W], clamped to 0..1."""
        ...


class Model(Coder, Protocol):
    """A loaded model: weights on one device, its text encoder and its VAE."""

    @property
    def name(self) -> str:
        """The registry's name."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in; latents outside it are float32."""
        ...

    @property
    def space(self) -> Space:
        """What sigma means for this model."""
        ...

    @property
    def scale_factor(self) -> int:
        """Pixels per latent cell, along each side."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        ...

    @property
    def extra_channels(self) -> int:
        """Channels that `denoise` wants besides the latent: 0, or for inpainting 5 (mask, masked latent)."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """[C, h, w] of a picture of `width` x `height` pixels, multiples of `scale_factor`."""
        ...

    def condition(self, prompt: str, *, clip_skip: int = 0) -> Conditioning:
        """What the prompt tells the denoiser. Remembered per prompt."""
        ...

    def adapted(self, uses: Uses) -> Model:
        """The model with LoRAs laid over it, each with its weight; the same object for the same ones.

        It shares the networks and costs the weights that differ. Rows of one pass belong to one such
        object. Raises `JobError`: a LoRA was made for another architecture.
        """
        ...

    def denoise(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Mapping[str, Tensor],
        residuals: Residuals | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """One pass: the denoised latents [R, C, h, w], float32, of R rows.

        `x` [R, C, h, w] contiguous; `sigma` [R], each row its own; `conditioning`: the rows' tensors by name,
        each with R rows; `extra` [R, extra_channels, h, w]. Guidance is the caller's affair.
        """
        ...

    def control(
        self,
        net: ControlNet,
        x: Tensor,
        sigma: Tensor,
        conditioning: Mapping[str, Tensor],
        hints: Tensor,
    ) -> Residuals:
        """What a ControlNet adds to `denoise` of the same rows, at strength 1.

        `hints` [R, 3, scale_factor * h, scale_factor * w] are fed as they are.
        """
        ...

    def inpaint_channels(self, z0: Tensor, mask: Tensor | None, masked: Tensor | None) -> Tensor | None:
        """What `denoise` wants as `extra` for one row [1, extra_channels, h, w]; None: it wants nothing.

        `z0` [1, C, h, w] is the picture's latent, `mask` [1, 1, h, w] where noise acts (None: everywhere),
        `masked` [1, C, h, w] the latent of the picture without what the mask hides (None: there is none).
        """
        ...


class Family(Protocol):
    """Loads one kind of model, and what goes with it."""

    name: str

    def inspect(self, entry: ModelEntry) -> ModelTraits:
        """What the weights are, by headers and configurations alone; hashes them. Raises `ModelLoadError`."""
        ...

    def load(self, entry: ModelEntry, device: torch.device | str, dtype: torch.dtype | None = None) -> Model:
        """Read the weights onto `device`. `dtype` None: as the entry says. Raises `ModelLoadError`."""
        ...

    def inspect_controlnet(self, entry: ControlnetEntry) -> ModelTraits:
        """As `inspect`, of a ControlNet."""
        ...

    def load_controlnet(self, entry: ControlnetEntry, device: torch.device | str) -> ControlNet:
        """Read a ControlNet onto `device`. Raises `ModelLoadError`."""
        ...

    def inspect_vae(self, entry: VaeEntry) -> ModelTraits:
        """As `inspect`, of a VAE by itself."""
        ...

    def load_vae(self, entry: VaeEntry, device: torch.device | str) -> Coder:
        """Read a VAE onto `device`. Raises `ModelLoadError`."""
        ...


FAMILIES: Final[Sequence[str]] = get_args(FamilyName)


def family(name: str, hashes: HashCache | None = None) -> Family:
    """The family of that name, `FAMILY` of its own module; `hashes` remembers digests between runs.

    Raises `UnsupportedError`: this version has no such family.
    """
    if name not in FAMILIES:
        raise UnsupportedError(
            f"this version renders no models of the family {name!r}",
            field="family", value=name, fix=f"use one of: {', '.join(FAMILIES)}",
        )  # fmt: skip
    made: Family = import_module(f"{__name__}.{name}").FAMILY(hashes)
    return made
