"""Celery's Redis transport, made to survive whatever lies in a queue.

A stock worker dies of an item that is not JSON, and gets stuck on some that are. Here an item is read for
one thing,
the job's id (with the text that Flower shows and the priority), and a fresh envelope is written from it;
nothing else
of the item goes on. What has no job id is put into a list for people to look at.
"""

import base64
import json
import math
import re
import uuid
from queue import Empty
from typing import Any, ClassVar

import structlog
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis

from overpaint_shared.queues import RENDER_TASK, STAMP_HEADER
from overpaint_worker.cycle import Intake

QUARANTINE_KEY = "op:quarantine"
QUARANTINE_LENGTH = 100
QUARANTINE_ITEM_CHARS = 400
MAX_BODY_CHARS = 4096
MAX_TITLE_CHARS = 200

# kombu's published types lack what its Redis transport has.
_Channel: Any = kombu_redis.Channel
_Transport: Any = kombu_redis.Transport

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BAD_ITEM = (ValueError, TypeError, KeyError, AttributeError, RecursionError)

log = structlog.get_logger(__name__)


class NoMessage(ValueError):
    """An item of a model's queue that names no job."""


def rebuilt(item: Any, queue: str) -> dict[str, Any]:
    """A fresh envelope for the job that `item` names. Raises one of `_BAD_ITEM` if it names none."""
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
            "argsrepr": title[:MAX_TITLE_CHARS] if isinstance(title, str) else job,
            "kwargsrepr": "",
            STAMP_HEADER: stamp if isinstance(stamp, int | float) and math.isfinite(stamp) else 0.0,
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


class SafeChannel(_Channel):  # type: ignore[misc]
    """Puts items that are no JSON aside instead of raising."""

    # Nothing goes back to its queue when a connection is lost: what was taken runs on under its lease, and
    # what is
    # given up is published anew. kombu's own way of putting it back fails, and ends the worker, where the
    # connection
    # is gone already or a thread acknowledges at that moment.
    do_restore = False

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON; Redis's own errors are neither
            item = getattr(error, "doc", None) or getattr(error, "object", b"")
            self.set_aside(item, error)
            raise Empty from None

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Acknowledge, unless the connection that brought the message is gone: its entry then runs out."""
        if not self.closed:
            super().basic_ack(delivery_tag, multiple)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Reject, unless the connection is gone: the reaper sends another message."""
        if not self.closed:
            super().basic_reject(delivery_tag, requeue)

    def set_aside(self, item: object, error: Exception) -> None:
        """Keep the last items that were no messages, for people to look at."""
        reason = f"{type(error).__name__}: {error}"[:QUARANTINE_ITEM_CHARS]
        log.warning("message quarantined", action="message.quarantined", reason=reason, list=QUARANTINE_KEY)
        record = json.dumps({"reason": reason, "item": repr(item)[:QUARANTINE_ITEM_CHARS]})
        with self.conn_or_acquire() as client:
            client.lpush(QUARANTINE_KEY, record)
            client.ltrim(QUARANTINE_KEY, 0, QUARANTINE_LENGTH - 1)

    def put_back(self, envelope: dict[str, Any], queue: str) -> None:
        """Return a message to the front of its queue: the BRPOP that brought it was sent before the worker
        closed.
        """
        key = self._q_for_pri(queue, envelope["properties"]["priority"])
        with self.conn_or_acquire() as client:
            client.rpush(key, json.dumps(envelope))


class SafeTransport(_Transport):  # type: ignore[misc]
    """The Redis transport of a worker."""

    Channel = SafeChannel
    intake: ClassVar[Intake | None] = None
    """Set once at start: kombu makes the transport itself."""

    def _deliver(self, message: Any, queue: str) -> None:
        intake = self.intake
        if intake is None or queue not in intake.models:  # replies and remote control come this way too
            super()._deliver(message, queue)
            return
        try:
            envelope = rebuilt(message, queue)
        except _BAD_ITEM as error:
            self._channel().set_aside(message, error)
            return
        if intake.closed:
            self._channel().put_back(envelope, queue)
            return
        intake.taken(queue)
        super()._deliver(envelope, queue)

    def _channel(self) -> SafeChannel:
        channel: SafeChannel = next(channel for channel in self.channels if channel)
        return channel


def install(intake: Intake) -> None:
    """Make Redis URLs of this process use `SafeTransport`. Only workers do; `rediss://` keeps its TLS."""
    SafeTransport.intake = intake
    path = f"{__name__}:{SafeTransport.__name__}"
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = path


__all__ = ["QUARANTINE_KEY", "NoMessage", "SafeChannel", "SafeTransport", "install", "rebuilt"]
