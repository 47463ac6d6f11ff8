"""Puts an engine together: device, models, loop, conductor; for the engine process and `overpaint render`."""

from __future__ import annotations

import os
import platform

import structlog
import torch

from overpaint_shared.errors import SettingsError
from overpaint_worker import protocol as p
from overpaint_worker.engine.clipseg.store import SegmenterStore
from overpaint_worker.engine.conductor import Conductor, Emit
from overpaint_worker.engine.decoders import Decoders
from overpaint_worker.engine.families.weights import HashCache
from overpaint_worker.engine.limits import RowLimits
from overpaint_worker.engine.loop import Loop
from overpaint_worker.engine.models import ModelStore
from overpaint_worker.engine.options import EngineOptions
from overpaint_worker.engine.receipt import DeviceInfo, versions
from overpaint_worker.engine.rows import BUCKETS
from overpaint_worker.engine.session import FEATURES, House
from overpaint_worker.evidence import Evidence
from overpaint_worker.registry import Registry

log = structlog.get_logger(__name__)


def open_device(name: str) -> torch.device:
    """The torch device of that name. Raises `SettingsError` where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _no_device(name, "it is no name of a device") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise _no_device(name, "this machine, or this torch, has no CUDA")
        if (device.index or 0) >= torch.cuda.device_count():
            raise _no_device(name, f"there are {torch.cuda.device_count()}")
    elif device.type != "cpu":
        raise _no_device(name, "only cpu and cuda are supported")
    return device


def _no_device(name: str, why: str) -> SettingsError:
    return SettingsError(
        f"there is no device {name!r}: {why}", field="device", value=name, fix="use cpu or cuda:N"
    )


def set_up_torch(threads: int) -> None:
    """Threads as told; float32 means float32, since TF32 would cost three digits."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def describe(device: torch.device) -> DeviceInfo:
    """Name and memory of a device."""
    threads = torch.get_num_threads()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory
        return DeviceInfo(device=str(device), name=properties.name, memory_total=memory, threads=threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = platform.processor() or platform.machine()
    return DeviceInfo(device="cpu", name=name, memory_total=memory, threads=threads)


def build(
    options: EngineOptions, emit: Emit, hashes: HashCache | None = None, evidence: Evidence | None = None
) -> Conductor:
    """An engine as the options say; `hashes`: digests that are known already; `evidence`: see `Conductor`.

    Raises `SettingsError` for a wrong registry or device.
    """
    set_up_torch(options.threads)
    hashes = hashes or HashCache(options.hashes)
    registry = Registry.load(options.registry)
    device = open_device(options.device)
    decoders = Decoders()
    decoders.warm()
    house = House(
        models=ModelStore(registry, device, options.kept_models, hashes),
        segmenters=SegmenterStore(registry, device, hashes),
        limits=options.limits,
        device=describe(device),
        decode=decoders,
    )
    ceiling = max(bucket for bucket in BUCKETS if bucket <= options.max_rows)
    loop = Loop(RowLimits(ceiling))
    return Conductor(house, emit, loop=loop, cpu_threads=options.cpu_threads, evidence=evidence)


def ready(conductor: Conductor, options: EngineOptions) -> p.Ready:
    """The engine's first message."""
    house = conductor.house
    return p.Ready(
        pid=os.getpid(),
        device=options.device,
        device_name=house.device.name,
        memory_total=house.device.memory_total,
        features=sorted(FEATURES),
        catalogue=[traits.to_json() for traits in (*house.models.catalogue(), *house.segmenters.catalogue())],
        versions=versions(),
    )
