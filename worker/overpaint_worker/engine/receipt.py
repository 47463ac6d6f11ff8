"""The receipt: everything that made a picture, so that it can be made again and judged later."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

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


def to_bytes(receipt: Mapping[str, Any]) -> bytes:
    """As it is stored: JSON for people too."""
    return json.dumps(receipt, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
