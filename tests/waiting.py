"""Waiting for a condition, never for a time."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_never = threading.Event()


def wait_until(condition: Callable[[], T], within_s: float = 30.0, what: str = "") -> T:
    """The condition's first true value. Fails the test after `within_s` seconds."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {within_s:g} s: {what or condition}"
        _never.wait(0.01)
    return value
