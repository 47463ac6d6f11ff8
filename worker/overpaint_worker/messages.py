"""What a worker reads of an item in a queue: the job's id, its title, its priority and its time.

Whoever may write to a queue may put anything there. So nothing of an item goes on: a fresh message is written
from these four values, and an item that names no job is refused.
"""

import base64
import json
import re
import uuid
from typing import Any, Final

from overpaint_shared.errors import visible
from overpaint_shared.queues import RENDER_TASK, STAMP_HEADER

MAX_ITEM_BYTES: Final = 65_536
"""A message of ours has about a thousand. A longer item is refused before it is parsed."""
MAX_BODY_CHARS: Final = 4096
MAX_TITLE_CHARS: Final = 200
LATEST_STAMP: Final = 1e11
"""Seconds since 1970; in about three thousand years."""

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class NoMessage(ValueError):
    """An item of a model's queue that names no job."""


def parsed(item: bytes) -> Any:
    """The JSON of an item. Raises NoMessage, or what the parser raises: ValueError, RecursionError."""
    if len(item) > MAX_ITEM_BYTES:
        raise NoMessage(f"an item of {len(item)} bytes")
    # Not kombu's parser: that makes objects of what an item calls a date or a decimal.
    return json.loads(item.decode("utf-8"))


def rebuilt(item: Any, queue: str) -> dict[str, Any]:
    """A fresh envelope for the job that `item` names. Raises an error of any kind if it names none."""
    job = _job_id(item)
    title, stamp = item["headers"].get("argsrepr", job), item["headers"].get(STAMP_HEADER)
    priority = item.get("properties", {}).get("priority", 0)
    return {
        "body": base64.b64encode(json.dumps([[job], {}, {}]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": RENDER_TASK,
            "id": job,
            "root_id": job,
            "argsrepr": visible(title[:MAX_TITLE_CHARS]) if isinstance(title, str) else job,
            "kwargsrepr": "",
            STAMP_HEADER: _stamp(stamp),
        },
        "properties": {
            "body_encoding": "base64",
            "correlation_id": job,
            "delivery_mode": 2,
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": priority if type(priority) is int and 0 <= priority <= 9 else 0,
        },
    }


def _job_id(item: Any) -> str:
    body = item["body"]
    if len(body) > MAX_BODY_CHARS:
        raise NoMessage(f"a body of {len(body)} characters")
    (job,), _, _ = json.loads(base64.b64decode(body, validate=True))
    if not isinstance(job, str) or not _JOB_ID.fullmatch(job):
        raise NoMessage("the argument is no job id")
    return job


def _stamp(value: object) -> float:
    """A time, 0.0 where it is none. JSON has integers of any length, so compare before converting."""
    if isinstance(value, int | float) and 0 <= value <= LATEST_STAMP:
        return float(value)
    return 0.0
