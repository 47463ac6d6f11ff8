"""Room on the device: what is idle is given up for what is needed."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from overpaint_shared.errors import OutOfMemory
from overpaint_worker.free_memory import free_memory

if TYPE_CHECKING:
    from overpaint_worker.engine.models import Named
    from overpaint_worker.engine.session import House


@dataclass(frozen=True)
class NoRoom:
    """What a session yields when memory ran out. It does the unit again when it goes on."""

    what: str
    """What it was about to do, and what the allocator said."""


def relieve(house: House, in_use: Collection[Named]) -> bool:
    """Give up all weights that no job uses; whether there were any.

    Call it when the exception that told of the shortage is gone, for its frames hold tensors.
    """
    models, segmenters = house.models.relieve(in_use), house.segmenters.relieve(in_use)
    gc.collect()
    if house.models.device.type == "cuda":
        torch.cuda.empty_cache()
    return models or segmenters


def too_little(house: House, wanted: NoRoom, names: Collection[Named]) -> OutOfMemory:
    """The error for a job that does not fit though nothing else is on the device."""
    needed = house.models.weight_bytes(names)
    free, total = _memory(house)
    return OutOfMemory(
        f"the device has too little memory to {wanted.what}; the job's weights take about {_size(needed)}, "
        f"{_size(free)} of {_size(total)} are free",
        fix="use a device with more memory, or a smaller picture",
    )


def _memory(house: House) -> tuple[int, int]:
    if house.models.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(house.models.device)
        return free, total
    return free_memory(), house.device.memory_total


def _size(number: int) -> str:
    return f"{number / 2**20:.0f} MiB"
