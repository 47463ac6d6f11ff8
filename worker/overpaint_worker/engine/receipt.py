"""The receipt: everything that made a picture, so that it can be made again and judged later."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

RECEIPT_VERSION: Final = 1
_LIBRARIES: Final = ("overpaint", "torch", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """What rendered."""

    device: str
    """`cpu`, `cuda:0`."""
    name: str
    memory_total: int
    """Bytes."""
    threads: int
    """Of torch, within one operation: on a CPU the last bits depend on how many there are."""


@cache
def versions() -> dict[str, str]:
    """Versions of what decides pixels."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "unknown"
    return found


def describe_inputs(inputs: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Digest and size of each picture that was sent."""
    return {
        reference: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for reference, data in sorted(inputs.items())
    }


def describe_mask(mask: Tensor | None) -> dict[str, Any] | None:
    """Digest of a mask [H, W] as little-endian float32, row by row, and the size it has."""
    if mask is None:
        return None
    digest = hashlib.sha256(np.ascontiguousarray(mask.numpy(), "<f4").data).hexdigest()
    return {"width": mask.shape[1], "height": mask.shape[0], "sha256": digest}


def to_bytes(receipt: Mapping[str, Any]) -> bytes:
    """As it is stored: JSON for people too."""
    return json.dumps(receipt, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
