"""A session: one job in the engine, from its spec and encoded inputs to its files.

Its work comes in three parts: `prepare` and `finish` deal with picture files and run on CPU threads; `work`
runs on the device's thread, one unit at a time, so that jobs take turns.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation has it
from torch import Tensor

from overpaint_shared.errors import JobError, UnsupportedError
from overpaint_shared.job import JobSpec, parse_job
from overpaint_shared.settings import Limits
from overpaint_worker.engine.controls import Control
from overpaint_worker.engine.methods import METHODS, Hint
from overpaint_worker.engine.packing import Packed, pack
from overpaint_worker.engine.preparation import Prepared, prepare
from overpaint_worker.engine.receipt import RECEIPT_VERSION, DeviceInfo, describe_inputs, to_bytes, versions
from overpaint_worker.engine.sampler import SAMPLERS
from overpaint_worker.engine.schedules import SCHEDULES
from overpaint_worker.engine.trajectory import Trajectory

if TYPE_CHECKING:
    from overpaint_shared.catalogue import ModelTraits
    from overpaint_worker.engine.families import Model, Work
    from overpaint_worker.engine.families.controlnet import ControlNet
    from overpaint_worker.engine.models import ModelStore
    from overpaint_worker.protocol import Render

T = TypeVar("T")
Load = Callable[[str], "Model"]
"""How a session gets its model, loaded. Raises `ModelLoadError`, `UnsupportedError`."""

FEATURES: Final = frozenset(
    [f"method:{name}" for name in METHODS]
    + [f"sampler:{name}" for name in SAMPLERS]
    + [f"scheduler:{name}" for name in SCHEDULES]
    + ["mask:image", "mask:alpha", "mask:pad", "mask:combine", "clip_skip", "differential"]
    + ["finish", "preserve", "prompt:weights", "controls"]
)
"""What this engine renders, in the words of `JobSpec.features()`."""

SEED_LIMIT: Final = 2**63


@dataclass(frozen=True, eq=False, kw_only=True)
class House:
    """What all sessions of an engine share."""

    models: ModelStore
    limits: Limits
    device: DeviceInfo


@dataclass(frozen=True, eq=False)
class Result:
    """A rendered job."""

    files: dict[str, bytes]
    """`image.png` (or .webp, .jpeg), `mask.png`, `receipt.json`."""
    summary: dict[str, Any]
    """Short: size, seconds, seed."""


class Session:
    """One job. Built on any thread; raises nothing until `prepare`."""

    def __init__(self, request: Render, house: House) -> None:
        self.request = request
        self.cancelled = False
        self.trajectory: Trajectory | None = None
        self.z0: Tensor | None = None
        self.latent: Tensor | None = None
        self._house = house
        self._spec: JobSpec | None = None
        self._ready: Prepared | None = None
        self._rendered: Tensor | None = None
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @property
    def name(self) -> tuple[str, int]:
        """Job and fencing token: one attempt."""
        return self.request.job, self.request.token

    @property
    def spec(self) -> JobSpec:
        """The resolved spec; from `prepare` on."""
        return _there(self._spec)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - began

    # ------------------------------------------------------------------------------------ CPU thread

    def prepare(self) -> None:
        """Parse and check the spec, decode the pictures, make canvas and mask.

        Raises:
            SpecError, InputError, MaskError, JobError: the job's own fault.
            UnsupportedError: this engine has not what it takes.

        """
        with self._timed("prepare"):
            self._spec = resolve(parse_job(self.request.spec_json), self._house.models, self._house.limits)
            self._ready = prepare(self._spec, self.request.inputs, self._house.limits)

    # --------------------------------------------------------------------------------- device thread

    def work(self, load: Load) -> Generator[str | Trajectory, Tensor | None, None]:
        """The device's part.

        Yields the stage of the unit that its next `send` does, or the trajectory whose latent it wants sent.
        """
        spec, ready = self.spec, _there(self._ready)
        yield "load"
        with self._timed("load"):
            model = load(spec.model)
        nets: list[ControlNet] = []
        for hint in ready.hints:
            yield "load"
            with self._timed("load"):
                nets.append(self._house.models.controlnet(hint.controlnet, hint.field))
        yield "condition"
        with self._timed("condition"):
            conditionings = [model.condition(text, clip_skip=spec.clip_skip) for text in self._texts()]
        z0 = self.z0 = yield from self._encoded(model, ready.start.picture)
        masked = yield from self._encoded(model, ready.start.masked)
        mask = self._latent_mask(_there(z0))
        extra = model.inpaint_channels(_there(z0), mask, masked)
        controls = [_control(model, net, hint) for net, hint in zip(nets, ready.hints, strict=True)]
        self.trajectory = self._begin(
            model, _there(z0), conditionings, mask=mask, extra=extra, controls=controls
        )
        began = time.perf_counter()
        self.latent = _there((yield self.trajectory))
        self._seconds["denoise"] = time.perf_counter() - began
        self._rendered = yield from self._units("decode", model.decode(self.latent))

    def _encoded(self, model: Model, picture: Tensor | None) -> Generator[str, Any, Tensor | None]:
        """The latent of a picture [h, w, 3] of the model's size, where there is one."""
        if picture is None:
            return None
        px = _planes(picture, model)
        return (yield from self._units("encode", model.encode(px)))

    def _units(self, stage: str, work: Work[T]) -> Generator[str, Any, T]:
        while True:
            yield stage
            try:
                with self._timed(stage):
                    next(work)
            except StopIteration as end:
                result: T = end.value
                return result

    def _texts(self) -> list[str]:
        """The prompt, then the negative one where it counts."""
        guided = not math.isclose(_there(self.spec.sampling.cfg), 1.0)
        return [self.spec.prompt, self.spec.negative_prompt] if guided else [self.spec.prompt]

    def _begin(self, model: Model, z0: Tensor, conditionings: list[Any], **more: Any) -> Trajectory:
        sampling = self.spec.sampling
        kind = SAMPLERS[_there(sampling.sampler)]
        sigmas = model.space.sigmas(
            _there(sampling.scheduler), _there(sampling.steps), _there(sampling.denoise),
            drop_penultimate=kind.drop_penultimate,
        )  # fmt: skip
        return Trajectory(
            job=self.request.job, model=model, sampler=kind, sigmas=sigmas, z0=z0,
            seed=_there(sampling.seed), positive=conditionings[0],
            negative=conditionings[1] if len(conditionings) > 1 else None, cfg=_there(sampling.cfg),
            differential=sampling.differential, deterministic=sampling.deterministic, **more,
        )  # fmt: skip

    def _latent_mask(self, z0: Tensor) -> Tensor | None:
        mask = _there(self._ready).start.noise_mask
        if mask is None:
            return None
        plane = F.interpolate(mask[None, None].to(torch.float32), z0.shape[-2:], mode="bilinear")
        return plane.to(z0.device)

    # ------------------------------------------------------------------------------------ CPU thread

    def finish(self) -> Result:
        """Put the original back, encode the files, write the receipt. Raises `JobError` for `preserve`."""
        with self._timed("store"):
            note = {"Software": f"Overpaint {versions()['overpaint']}", "overpaint": self.spec.to_json()}
            packed = pack(self.spec, _there(self._ready), _there(self._rendered), self._house.limits, note)
        receipt = self._receipt(packed)
        summary = {
            "width": packed.width, "height": packed.height, "seed": self.spec.sampling.seed,
            "seconds": receipt["seconds"],
        }  # fmt: skip
        return Result({**packed.files, "receipt.json": to_bytes(receipt)}, summary)

    def _receipt(self, packed: Packed) -> dict[str, Any]:
        trajectory, ready = _there(self.trajectory), _there(self._ready)
        model = trajectory.model
        spent = {stage: round(seconds, 6) for stage, seconds in self._seconds.items()}
        total = time.perf_counter() - self._began
        return {
            "version": RECEIPT_VERSION,
            "job": self.request.job,
            "token": self.request.token,
            "spec": self.spec.model_dump(mode="json", by_alias=True),
            "inputs": describe_inputs(self.request.inputs),
            "model": _describe(self._house.models.traits(self.spec.model)),
            "device": {"device": self._house.device.device, "name": self._house.device.name,
                       "dtype": str(model.dtype).removeprefix("torch.")},
            "versions": versions(),
            "size": {"width": packed.width, "height": packed.height,
                     "model_width": ready.fit.model.width, "model_height": ready.fit.model.height},
            "sigmas": [float(sigma) for sigma in trajectory.sigmas],
            "evaluations": {"count": trajectory.evaluations, "rows_each": trajectory.row_count,
                            "alone": self.request.alone,
                            "by_company": {str(n): k for n, k in sorted(trajectory.companies.items())}},
            "outside_mask": packed.outside.to_json() if packed.outside else None,
            "adjustments": trajectory.adjustments,
            "notes": list(ready.notes),
            "seconds": {**spent, "waiting": round(max(total - sum(spent.values()), 0.0), 6),
                        "total": round(total, 6)},
        }  # fmt: skip


def resolve(spec: JobSpec, models: ModelStore, limits: Limits) -> JobSpec:
    """The spec with its model's defaults and, if it has none, a seed; held against this engine.

    Raises:
        UnsupportedError: no such model here, or features that this engine does not have. JobError: too many
        steps.

    """
    spec = spec.resolved(models.registry.model(spec.model).defaults)
    if missing := sorted(spec.features() - FEATURES):
        raise UnsupportedError(
            f"this engine cannot render: {', '.join(missing)}",
            value=missing[0], fix="leave that out, or start a worker of a newer version",
        )  # fmt: skip
    if (steps := _there(spec.sampling.steps)) > limits.max_steps:
        raise JobError(
            f"{steps} steps are more than this farm allows",
            field="sampling.steps", value=steps, fix=f"use at most {limits.max_steps}",
        )  # fmt: skip
    return spec if spec.sampling.seed is not None else spec.with_seed(secrets.randbelow(SEED_LIMIT))


def _control(model: Model, net: ControlNet, hint: Hint) -> Control:
    """The hint's share of the full schedule, in sigmas."""
    space = model.space
    return Control(
        net=net, hint=_planes(hint.picture, model), strength=hint.strength,
        first=space.at_percent(hint.start), last=space.at_percent(hint.end),
    )  # fmt: skip


def _planes(picture: Tensor, model: Model) -> Tensor:
    """[h, w, 3] as [1, 3, h, w] on the model's device."""
    return picture.permute(2, 0, 1)[None].contiguous().to(model.device)


def _describe(traits: ModelTraits) -> dict[str, Any]:
    return {
        "name": traits.name, "family": traits.family, "sha256": traits.sha256,
        "prediction": traits.prediction, "channels": traits.channels,
    }  # fmt: skip


def _there(value: T | None) -> T:
    """A value that an earlier part of the session, or `resolved`, has set."""
    if value is None:
        raise RuntimeError("the session's parts were called out of order")
    return value
