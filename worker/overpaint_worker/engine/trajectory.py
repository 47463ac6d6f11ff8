"""A trajectory: one job's way from noise to latent. Its place on its sigmas, its mask, its conditioning.

It knows nothing of other jobs: it says which rows it wants evaluated, and takes what they gave.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from overpaint_worker.engine.rows import Row, common_tokens
from overpaint_worker.engine.sampler import Evaluation, Path, Sampler, SamplerKind
from overpaint_worker.engine.sampler.brownian import BrownianPath

if TYPE_CHECKING:
    from overpaint_worker.engine.controls import Control
    from overpaint_worker.engine.families import Model
    from overpaint_worker.engine.families.conditioning import Conditioning

SEED_BITS: Final = 2**32 - 1
"""Only the low 32 bits of a seed count: the CPU's generator takes no more."""


class Noise:
    """A job's own source of standard normal noise, drawn on the CPU: on every device the same."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator = torch.Generator("cpu").manual_seed(seed & SEED_BITS)

    def __call__(self, like: Tensor) -> Tensor:
        """Fresh noise in the shape and on the device of `like`."""
        return torch.randn(like.shape, generator=self._generator, dtype=torch.float32).to(like.device)

    def path(self, like: Tensor, sigmas: Tensor) -> Path:
        """A Brownian path of this seed over the levels of `sigmas` above 0."""
        return BrownianPath(like, sigmas[sigmas > 0].min(), sigmas.max(), self._seed)


class Trajectory:
    """One job in the step loop.

    Args:
        job: the job's name, for logs.
        model: the loaded model.
        sampler: how it steps.
        sigmas: noise levels falling to 0, float32 on the CPU; empty: the latent stays as it is.
        z0: the picture's latent, scaled, float32 [1, C, h, w] on the model's device.
        seed: of the noise.
        positive: conditioning of the prompt.
        negative: conditioning of the negative prompt; not evaluated, and may be None, where `cfg` is 1.
        cfg: guidance: `negative + (positive - negative) * cfg`.
        mask: [1, 1, h, w] in 0..1, 1 = repaint; None: everywhere.
        differential: repaint each latent cell only from the time on that its mask value stands for.
        extra: [1, E, h, w]: constant channels of inpainting models.
        controls: ControlNets, each between its two sigmas, in the order in which they are summed.
        deterministic: same bits whatever the company.

    """

    def __init__(
        self,
        *,
        job: str,
        model: Model,
        sampler: SamplerKind,
        sigmas: Tensor,
        z0: Tensor,
        seed: int,
        positive: Conditioning,
        negative: Conditioning | None,
        cfg: float,
        mask: Tensor | None = None,
        differential: bool = False,
        extra: Tensor | None = None,
        controls: Sequence[Control] = (),
        deterministic: bool = False,
    ) -> None:
        self.job, self.model, self.sigmas, self.z0, self.cfg = job, model, sigmas, z0, cfg
        self.mask, self.differential, self.extra = mask, differential, extra
        self.controls = tuple(controls)
        self.deterministic = deterministic
        guided = negative is not None and not math.isclose(cfg, 1.0)
        self.conditionings = [negative, positive] if guided and negative is not None else [positive]
        """In the order of its rows: negative first, as the reference has it."""
        self.noise = Noise(seed)(z0)
        self._blend = Noise(seed + 1)(z0) if sampler.fresh_blend else self.noise
        self.evaluations = 0
        self.step = 0
        """How many of its levels it has reached; samplers may evaluate more than once a step."""
        self.companies: dict[int, int] = {}
        """How many evaluations were shared by how many jobs."""
        self.adjustments: list[str] = []
        """What the engine had to do differently for want of memory; goes into the receipt."""
        self.result: Tensor | None = None
        self.want: Evaluation | None = None
        self._levels: list[float] = sigmas.tolist()
        self._use(None if differential else mask)
        self._begin(sampler, seed)

    def _begin(self, kind: SamplerKind, seed: int) -> None:
        if len(self.sigmas) == 0:
            self.result = self.z0
            return
        x = self.model.space.start(self.z0, self.noise, self.sigmas[0])
        # Another generator of that seed: the first ancestral noise is the start noise, as in the reference
        self._sampler: Sampler = kind.begin(x, self.sigmas, Noise(seed))
        self._ask(next(self._sampler))

    def _ask(self, want: Evaluation) -> None:
        self.want, self._x = want, want.x
        reached = float(want.sigma)
        self.step = sum(level >= reached for level in self._levels[1:])
        if self.mask is not None and self.differential:
            self._use((self.mask >= self._share(want.sigma)).to(self.mask.dtype))
        if self._mask is not None:
            known = self.model.space.noised(self.z0, self._blend, want.sigma)
            self._x = want.x * self._mask + known * self._spared

    def _use(self, mask: Tensor | None) -> None:
        """Repaint under this mask from now on; what does not change with the latent is computed once."""
        self._mask = mask
        if mask is not None:
            self._spared = 1 - mask
            self._kept = self.z0 * self._spared

    def _share(self, sigma: Tensor) -> float:
        """How much of its way in time lies ahead at `sigma`, 0..1."""
        space = self.model.space
        end = space.timestep(self.sigmas[-1].clamp_min(space.sigma_min))
        span = space.timestep(self.sigmas[0]) - end
        return float((space.timestep(sigma) - end) / span) if span else 1.0

    @property
    def steps(self) -> int:
        """Steps from the first noise level to 0."""
        return max(len(self.sigmas) - 1, 0)

    @property
    def tokens(self) -> int:
        """Length at which its texts meet."""
        return common_tokens(c.tokens for c in self.conditionings)

    @property
    def row_count(self) -> int:
        """Rows of one evaluation: two with guidance, one without."""
        return len(self.conditionings)

    @property
    def key(self) -> Hashable:
        """Trajectories of equal keys can share a pass."""
        extra = None if self.extra is None else self.extra.shape[1]
        exact = self.tokens if self.deterministic else None
        shape = tuple(self.z0.shape[1:])
        return (id(self.model), shape, self.conditionings[-1].signature(), extra, exact)

    @property
    def curve(self) -> Hashable:
        """Trajectories of equal curves cost the same per row: same weights, same shape."""
        return (self.model.name, tuple(self.z0.shape[1:]))

    def rows(self) -> list[Row]:
        """What it wants evaluated now."""
        if self.want is None:
            raise ValueError(f"the trajectory of {self.job} has ended")
        sigma = self.want.sigma
        acting = tuple(control for control in self.controls if control.acts_at(sigma))
        return [Row(self._x, sigma, c, self.extra, acting) for c in self.conditionings]

    def advance(self, denoised: Tensor, company: int = 1) -> None:
        """Take the rows' denoised latents [row_count, C, h, w], of a pass that `company` jobs shared."""
        d = denoised[-1:]
        if len(denoised) > 1:
            d = denoised[:1] + (d - denoised[:1]) * self.cfg
        if self._mask is not None:
            d = d * self._mask + self._kept
        self.evaluations += 1
        self.companies[company] = self.companies.get(company, 0) + 1
        try:
            self._ask(self._sampler.send(d))
        except StopIteration as end:
            self.want, self.result, self.step = None, end.value, self.steps

    def close(self) -> None:
        """Give up: lets go of what the sampler holds."""
        self.want = None
        if len(self.sigmas):
            self._sampler.close()
