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
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation has it
from torch import Tensor

from overpaint_shared.errors import JobError, UnsupportedError
from overpaint_shared.job import JobSpec, parse_job
from overpaint_shared.settings import Limits
from overpaint_worker.engine.clipseg.findings import Findings, search, texts
from overpaint_worker.engine.controls import Control
from overpaint_worker.engine.decoding import Decode, decode
from overpaint_worker.engine.entries import check_entries, named
from overpaint_worker.engine.families.prompt import stretches
from overpaint_worker.engine.faults import all_numbers
from overpaint_worker.engine.loop import is_out_of_memory
from overpaint_worker.engine.methods import METHODS, Hint
from overpaint_worker.engine.packing import Packed, pack
from overpaint_worker.engine.preparation import Opened, Prepared, begin, open_pictures
from overpaint_worker.engine.provenance import RECEIPT_KEY, with_text
from overpaint_worker.engine.receipt import (
    RECEIPT_VERSION,
    DeviceInfo,
    describe_inputs,
    describe_mask,
    to_bytes,
    versions,
)
from overpaint_worker.engine.room import NoRoom
from overpaint_worker.engine.sampler import SAMPLERS
from overpaint_worker.engine.schedules import SCHEDULES
from overpaint_worker.engine.trajectory import Trajectory

if TYPE_CHECKING:
    from overpaint_shared.catalogue import ModelTraits
    from overpaint_worker.engine.clipseg.store import SegmenterStore
    from overpaint_worker.engine.families import Coder, Model, Work
    from overpaint_worker.engine.families.controlnet import ControlNet
    from overpaint_worker.engine.models import ModelStore, Named
    from overpaint_worker.protocol import Render

T = TypeVar("T")
Load = Callable[[str], "Model"]
"""How a session gets its model, loaded. Raises `ModelLoadError`, `UnsupportedError`."""

Errand = Callable[[], Any]
"""Work for a CPU thread that a job's device part waits for."""
Want = str | Trajectory | Errand | NoRoom

FEATURES: Final = frozenset(
    [f"method:{name}" for name in METHODS]
    + [f"sampler:{name}" for name in SAMPLERS]
    + [f"scheduler:{name}" for name in SCHEDULES]
    + ["mask:image", "mask:alpha", "mask:pad", "mask:clipseg", "mask:combine", "clip_skip", "differential"]
    + ["finish", "preserve", "region:only_masked", "prompt:weights", "controls", "lora", "vae"]
)
"""What this engine renders, in the words of `JobSpec.features()`."""

SEED_LIMIT: Final = 2**63


@dataclass(frozen=True, eq=False, kw_only=True)
class House:
    """What all sessions of an engine share."""

    models: ModelStore
    segmenters: SegmenterStore
    limits: Limits
    device: DeviceInfo
    decode: Decode = decode
    """How strangers' pictures are decoded; an engine does it in processes of their own."""


@dataclass(frozen=True, eq=False)
class Result:
    """A rendered job."""

    files: dict[str, bytes]
    """`image.png` (or .webp, .jpeg), `mask.png`, `receipt.json`."""
    summary: dict[str, Any]
    """Short: size, seconds, seed."""


@dataclass(frozen=True, eq=False)
class _Loaded:
    """All the weights of a job."""

    model: Model
    coder: Coder
    nets: list[ControlNet]
    """One for each of the job's hints."""


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
        self._opened: Opened | None = None
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

    @property
    def names(self) -> set[Named]:
        """All weights that it names; empty before `prepare`."""
        if self._spec is None:
            return set()
        entries = [entry for _, entry in named(self._spec, self._house.models.registry)]
        found = {("models", self._spec.model), *((entry.table, entry.name) for entry in entries)}
        return found | {("segmenters", mask.segmenter) for _, mask in texts(self._spec)}

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
            self._each_text(stretches)  # what cannot be read is refused before the device is asked for it
            self._opened = open_pictures(
                self._spec, self.request.inputs, self._house.limits, self._house.decode
            )
            if not texts(self._spec):
                self._begin_with(None)

    # --------------------------------------------------------------------------------- device thread

    def work(self, load: Load) -> Generator[Want, Any, None]:
        """The device's part.

        Yields the stage of the unit that its next `send` does, an errand for a CPU thread, or the trajectory
        whose latent it wants sent.
        """
        if self._ready is None:
            yield from self._search()
        spec, ready = self.spec, _there(self._ready)
        if ready.skipped:
            return
        loaded = yield from self._loaded((yield from self._brought(lambda: load(spec.model))))
        model, coder, nets = loaded.model, loaded.coder, loaded.nets
        yield "condition"
        with self._timed("condition"):
            conditionings = self._each_text(partial(model.condition, clip_skip=spec.clip_skip))
        z0 = self.z0 = yield from self._encoded(coder, ready.start.picture)
        masked = yield from self._encoded(coder, ready.start.masked)
        mask = self._latent_mask(_there(z0))
        extra = model.inpaint_channels(_there(z0), mask, masked)
        controls = [_control(model, net, hint) for net, hint in zip(nets, ready.hints, strict=True)]
        self.trajectory = self._begin(
            model, _there(z0), conditionings, mask=mask, extra=extra, controls=controls
        )
        began = time.perf_counter()
        latent = self.latent = all_numbers(_there((yield self.trajectory)), model.dtype)
        self._seconds["denoise"] = time.perf_counter() - began
        self._rendered = yield from self._units("decode", lambda: coder.decode(latent))

    def _search(self) -> Generator[Want, Any, None]:
        """Find what the mask's texts name, text by text; the mask itself is made on a CPU thread."""
        opened, found = _there(self._opened), Findings()
        searching = search(self.spec, opened.canvas.rgb, self._house.segmenters)
        for path, mask in texts(self.spec):
            if not self._house.segmenters.has(mask.segmenter):
                yield from self._brought(partial(self._house.segmenters.get, mask.segmenter, path))
            yield "mask"
            with self._timed("mask"):
                found = next(searching)

        def make() -> None:
            with self._timed("mask"):
                self._begin_with(found)

        yield make

    def _begin_with(self, findings: Findings | None) -> None:
        self._ready = begin(_there(self._opened), self._house.limits, findings)

    def _brought(self, make: Callable[[], T]) -> Generator[Want, Any, T]:
        """Load something; again when there is room, where memory was short."""
        while True:
            yield "load"
            try:
                with self._timed("load"):
                    return make()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                short = NoRoom(f"load ({_first_line(error)})")
            yield short  # here, where the exception and its frames are gone

    def _loaded(self, model: Model) -> Generator[Want, Any, _Loaded]:
        """What else the job names: LoRAs laid over its model, a VAE of its own, ControlNets."""
        spec, store = self.spec, self._house.models
        nets: list[ControlNet] = []
        for hint in _there(self._ready).hints:
            net = yield from self._brought(partial(store.controlnet, hint.controlnet, hint.field))
            nets.append(net)
        coder: Coder = model
        if spec.vae is not None:
            coder = yield from self._brought(partial(store.vae, spec.vae))
        if spec.loras:
            bare = model
            model = yield from self._brought(
                lambda: bare.adapted([(store.lora(use.name), use.weight) for use in spec.loras])
            )
        return _Loaded(model, coder, nets)

    def _encoded(self, coder: Coder, picture: Tensor | None) -> Generator[Want, Any, Tensor | None]:
        """The latent of a picture [h, w, 3] of the model's size, where there is one."""
        if picture is None:
            return None
        px = _planes(picture, self._house.models.device)
        if self.spec.compat == "comfyui" and px.device.type == "cpu":
            # The reference's layout, for which torch's group norm on a CPU adds up coarsely
            px = px.contiguous(memory_format=torch.channels_last)
        return (yield from self._units("encode", lambda: coder.encode(px)))

    def _units(self, stage: str, begin: Callable[[], Work[T]]) -> Generator[Want, Any, T]:
        """Work unit by unit; from the start again when there is room, where memory was short."""
        work = begin()
        while True:
            yield stage
            try:
                with self._timed(stage):
                    next(work)
                continue
            except StopIteration as end:
                result: T = end.value
                return result
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                short = NoRoom(f"{stage} ({_first_line(error)})")
            del work
            yield short
            work = begin()

    def _each_text(self, read: Callable[[str], T]) -> list[T]:
        """What is read from the prompt, then from the negative one where it counts."""
        found = [read(self.spec.prompt)]
        if math.isclose(_there(self.spec.sampling.cfg), 1.0):
            return found
        try:
            return [*found, read(self.spec.negative_prompt)]
        except JobError as error:
            if error.field == "prompt":  # the reader does not know which of the two it has
                error.field = "negative_prompt"
            raise

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
            packed = pack(self.spec, _there(self._ready), self._rendered, self._house.limits, note)
        receipt = self._receipt(packed)
        summary = {
            "width": packed.width, "height": packed.height, "seed": self.spec.sampling.seed,
            "seconds": receipt["seconds"],
        }  # fmt: skip
        written = to_bytes(receipt)
        files = {**packed.files, "receipt.json": written}
        if self.spec.output.format == "png":
            files[packed.image] = with_text(files[packed.image], {RECEIPT_KEY: written.decode()})
        return Result(files, summary)

    def _weights(self) -> list[dict[str, Any]]:
        """What the job named besides its model: ControlNets, LoRAs, a VAE."""
        store = self._house.models
        found = [(field, store.traits_of(entry)) for field, entry in named(self.spec, store.registry)]
        return [
            {"field": field, "kind": traits.kind, "name": traits.name, "sha256": traits.sha256}
            for field, traits in found
        ]

    def _segmenters(self) -> list[dict[str, Any]]:
        """The weights that found the mask, each once."""
        names = dict.fromkeys(mask.segmenter for _, mask in texts(self.spec))
        return [_describe(self._house.segmenters.traits(name)) for name in names]

    def _course(self) -> dict[str, Any]:
        """How the steps went; empty where nothing was rendered."""
        course = self.trajectory
        if course is None:
            return {"sigmas": [], "evaluations": None, "adjustments": []}
        return {
            "sigmas": [float(sigma) for sigma in course.sigmas],
            "evaluations": {"count": course.evaluations, "rows_each": course.row_count,
                            "alone": self.request.alone,
                            "by_company": {str(n): k for n, k in sorted(course.companies.items())}},
            "adjustments": course.adjustments,
        }  # fmt: skip

    def _receipt(self, packed: Packed) -> dict[str, Any]:
        ready = _there(self._ready)
        spent = {stage: round(seconds, 6) for stage, seconds in self._seconds.items()}
        total = time.perf_counter() - self._began
        return {
            "version": RECEIPT_VERSION,
            "job": self.request.job,
            "token": self.request.token,
            "spec": self.spec.model_dump(mode="json", by_alias=True),
            "inputs": describe_inputs(self.request.inputs),
            "model": _describe(self._house.models.traits(self.spec.model)),
            "weights": self._weights(),
            "segmenters": self._segmenters(),
            "device": {"device": self._house.device.device, "name": self._house.device.name,
                       "dtype": _dtype(self.trajectory), "threads": self._house.device.threads},
            "versions": versions(),
            "size": {"width": packed.width, "height": packed.height,
                     "model_width": ready.fit.model.width, "model_height": ready.fit.model.height},
            "region": ready.region.box._asdict() if ready.region else None,
            "picture": {"name": packed.image, "pixels_sha256": packed.pixels},
            "mask": describe_mask(ready.mask),
            "certificate": packed.certificate.to_json() if packed.certificate else None,
            "skipped": ready.skipped,
            **self._course(),
            "notes": list(ready.notes),
            "seconds": {**spent, "waiting": round(max(total - sum(spent.values()), 0.0), 6),
                        "total": round(total, 6)},
        }  # fmt: skip


def _dtype(trajectory: Trajectory | None) -> str | None:
    return str(trajectory.model.dtype).removeprefix("torch.") if trajectory else None


def resolve(spec: JobSpec, models: ModelStore, limits: Limits) -> JobSpec:
    """The spec with its model's defaults and, if it has none, a seed; held against this engine.

    Raises:
        UnsupportedError: no such model or other weights here, or features that this engine does not have.
        JobError: too many steps; weights that do not go together. ModelLoadError: some cannot be read.

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
    check_entries(spec, models)
    return spec if spec.sampling.seed is not None else spec.with_seed(secrets.randbelow(SEED_LIMIT))


def _control(model: Model, net: ControlNet, hint: Hint) -> Control:
    """The hint's share of the full schedule, in sigmas."""
    space = model.space
    return Control(
        net=net, hint=_planes(hint.picture, model.device), strength=hint.strength,
        first=space.at_percent(hint.start), last=space.at_percent(hint.end),
    )  # fmt: skip


def _planes(picture: Tensor, device: torch.device) -> Tensor:
    """[h, w, 3] as [1, 3, h, w] on a device."""
    return picture.permute(2, 0, 1)[None].contiguous().to(device)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


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
