"""Celery on both sides: one queue per model, four priorities, messages that carry a job id and nothing else.

A message is a wake-up. Everything that matters is in the ledger; losing or doubling a message is harmless.
"""

import base64
import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Final

from celery import Celery
from kombu import Producer, Queue
from kombu.exceptions import BatchPublishError

from overpaint_shared.ledger.records import Wakeup
from overpaint_shared.ledger.scripts import PRIORITY_CLASSES, PRIORITY_SEPARATOR, QUEUE_PREFIX
from overpaint_shared.ledger.wire import priority_class

RENDER_TASK: Final = "overpaint.render"
STAMP_HEADER: Final = "op_ts"
"""The header in which a message carries its wake-up's stamp, for the reaper."""
VISIBILITY_TIMEOUT_S: Final = 43_200


def queue_name(model: str) -> str:
    """The queue of a model's jobs."""
    return f"{QUEUE_PREFIX}{model}"


def priority_step(priority: int) -> int:
    """The Celery priority for a job's priority 0 (first) .. 9: 0, 3, 6 or 9."""
    return priority_class(priority)


def make_app(redis_url: str, models: Sequence[str] = ()) -> Celery:
    """The Celery app of a producer (no models) or of a worker of `models`."""
    raise NotImplementedError


def publish(app: Celery, wakeups: Iterable[Wakeup]) -> int:
    """Send the messages of `wakeups`; returns how many. Raises `LedgerUnreachable` when the broker is away."""
    raise NotImplementedError
