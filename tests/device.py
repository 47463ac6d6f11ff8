"""The device that the engine's tests render on.

`OVERPAINT_TEST_DEVICE=cuda:0` runs every test that renders through `tests.rendering` on that device, in
float32 with the tolerances of the CPU, and the tests marked `gpu` besides.
"""

from __future__ import annotations

import os
from typing import Final

import pytest

DEVICE_NAME: Final = os.environ.get("OVERPAINT_TEST_DEVICE", "cpu")
"""As torch and `--device` call it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that are about a GPU, where none was named."""
    if DEVICE_NAME.startswith("cuda"):
        return
    without = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=without)
