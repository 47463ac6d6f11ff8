"""Celery on both sides: one queue per model, four priorities, messages that carry a job id and nothing else.

A message is a wake-up. Everything that matters is in the ledger; losing or doubling a message is harmless.
"""

import base64
import json
import ssl
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import BatchPublishError, OperationalError  # type: ignore[attr-defined]
from kombu.utils.url import parse_url
from redis.exceptions import RedisError, ResponseError

from overpaint_shared.ledger.faults import typed, unreachable
from overpaint_shared.ledger.records import Wakeup
from overpaint_shared.ledger.scripts import PRIORITY_CLASSES, PRIORITY_SEPARATOR, QUEUE_PREFIX
from overpaint_shared.ledger.wire import chunks, priority_class
from overpaint_shared.setting_views import RedisUrl

RENDER_TASK: Final = "overpaint.render"
STAMP_HEADER: Final = "op_ts"
"""The header in which a message carries its wake-up's stamp, for the reaper. `tend.lua` reads it."""

VISIBILITY_TIMEOUT_S: Final = 43_200
_BATCH: Final = 200
Kombu = Any  # its producer; the published types are of a version without `batch`
_RETRIES: Final = {"max_retries": 3, "interval_start": 0.05, "interval_step": 0.2, "interval_max": 0.5}


def queue_name(model: str) -> str:
    """The queue of a model's jobs."""
    return f"{QUEUE_PREFIX}{model}"


def model_of(queue: str) -> str | None:
    """The model whose queue this is; None for any other queue."""
    return queue.removeprefix(QUEUE_PREFIX) if queue.startswith(QUEUE_PREFIX) else None


def list_name(model: str, priority: int) -> str:
    """The Redis list in which kombu keeps a model's messages of one priority, 0..9."""
    step = priority_class(priority)
    return queue_name(model) + (f"{PRIORITY_SEPARATOR}{step}" if step else "")


def priority_step(priority: int) -> int:
    """The Celery priority for a job's priority 0 (first) .. 9: 0, 3, 6 or 9."""
    return priority_class(priority)


def make_app(redis_url: str, models: Sequence[str] = ()) -> Celery:
    """The Celery app of a producer (no models) or of a worker of `models`. Both sides share every setting."""
    app = Celery("overpaint", broker=str(redis_url), set_as_current=False)
    app.conf.update(
        # The ledger has the results.
        result_backend=None,
        task_ignore_result=True,
        task_track_started=False,
        # Nothing but JSON is ever read.
        task_serializer="json",
        accept_content=["json"],
        # A queue that nobody configured is a mistake, not a new queue.
        task_create_missing_queues=False,
        task_queues=[_queue(model) for model in models],
        task_default_exchange="",
        # A message is acknowledged when its task ends, and then always: whether a job runs again is decided
        # by the ledger alone. With a prefetch of one per thread no worker hoards jobs.
        task_acks_late=True,
        task_acks_on_failure=True,
        task_acks_on_timeout=True,
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_pool="threads",
        # A lost connection ends no running job: its lease decides.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_send_task_events=True,  # Flower's tasks
        task_publish_retry=True,
        broker_transport_options=_transport_options(),
        broker_use_ssl=RedisUrl(redis_url).tls,
    )
    if redis_url.startswith("rediss:"):
        app.conf.broker_use_ssl = _tls(redis_url)
    if models:
        app.conf.task_default_queue = queue_name(models[0])
    return app


def _tls(redis_url: str) -> dict[str, Any]:
    """TLS options of a URL, also for Flower, which reads none there. By default kombu verifies nothing."""
    named: dict[str, Any] = parse_url(str(redis_url)).get("ssl", {})
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED} | named


def _queue(model: str) -> Queue:
    return Queue(queue_name(model), Exchange(""), routing_key=queue_name(model))


def _transport_options() -> dict[str, Any]:
    """No `retry_on_timeout` here: with it kombu would silently publish batches one by one."""
    return {
        # Only tidies up: messages of dead workers come back as no-ops. Jobs come back by their leases.
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "queue_order_strategy": "priority",
        # Steps that differ between the sides strand messages in lists that nobody reads.
        "priority_steps": list(PRIORITY_CLASSES),
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 10,
        **_RETRIES,  # of a first connection, which would else take six seconds to give up
    }


def publish(app: Celery, wakeups: Iterable[Wakeup]) -> int:
    """Send the messages of `wakeups`; returns how many.

    A batch that fails is sent again one by one, so some messages may go out twice. Raises `LedgerUnreachable`
    or `LedgerFull`; what was not sent then is sent by the reaper later.
    """
    sent = 0
    where = RedisUrl(app.conf.broker_url).shown
    with _typed_errors(where), app.producer_or_acquire() as producer:
        for chunk in chunks(wakeups, _BATCH):
            _publish_chunk(producer, chunk)
            sent += len(chunk)
    return sent


def _publish_chunk(producer: Kombu, wakeups: Sequence[Wakeup]) -> None:
    back = [wakeup for wakeup in wakeups if not wakeup.front]
    front = [wakeup for wakeup in wakeups if wakeup.front]
    try:
        with producer.batch(_BATCH):
            for wakeup in back:
                _send_back(producer, wakeup, retry=False)
        _send_front(producer, front)
    except (BatchPublishError, RedisError) as error:
        refusal = error.__cause__ or error
        if isinstance(refusal, ResponseError):  # Redis is there and says no: nothing to try again
            raise refusal from None
        for wakeup in back:
            _send_back(producer, wakeup, retry=True)
        producer.connection.ensure(producer, _send_front, **_RETRIES)(producer, front)


def _send_back(producer: Kombu, wakeup: Wakeup, *, retry: bool) -> None:
    producer.publish(
        _body(wakeup),
        exchange="",
        routing_key=queue_name(wakeup.model),
        priority=wakeup.priority,
        serializer="json",
        headers=_headers(wakeup) | {STAMP_HEADER: wakeup.stamp},
        correlation_id=wakeup.job_id,
        retry=retry,
        retry_policy=_RETRIES,
    )


def _send_front(producer: Kombu, wakeups: Sequence[Wakeup]) -> None:
    """Put messages where they are taken next, which Celery has no call for: a job that had its turn does not
    wait behind the whole list. They bear no stamp, so that the reaper does not take the rest for lost.
    """
    if not wakeups:
        return
    with producer.channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
        for wakeup in reversed(wakeups):
            pipe.rpush(list_name(wakeup.model, wakeup.priority), json.dumps(_envelope(wakeup)))
        pipe.execute()


def _body(wakeup: Wakeup) -> tuple[Any, ...]:
    """Celery's protocol 2: positional arguments, keyword arguments, what to call next."""
    return ((wakeup.job_id,), {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})


def _headers(wakeup: Wakeup) -> dict[str, Any]:
    return {
        "lang": "py",
        "task": RENDER_TASK,
        "id": wakeup.job_id,
        "root_id": wakeup.job_id,
        "argsrepr": wakeup.title or wakeup.job_id,
        "kwargsrepr": "{}",
        "ignore_result": True,
        "retries": 0,
    }


def _envelope(wakeup: Wakeup) -> dict[str, Any]:
    """A message as kombu's virtual transports keep it."""
    body = json.dumps(_body(wakeup)).encode()
    return {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": _headers(wakeup),
        "properties": {
            "body_encoding": "base64",
            "correlation_id": wakeup.job_id,
            "delivery_info": {"exchange": "", "routing_key": queue_name(wakeup.model)},
            "delivery_mode": 2,
            "delivery_tag": str(uuid.uuid4()),
            "priority": wakeup.priority,
        },
    }


@contextmanager
def _typed_errors(where: str) -> Iterator[None]:
    try:
        yield
    except OperationalError as error:  # kombu's name for what its connection raised, after retries
        cause = error.__cause__
        raise (typed(cause, where) if isinstance(cause, Exception) else None) or unreachable(
            str(error), where
        ) from error
    except RedisError as error:
        better = typed(error, where)
        if better is None:
            raise
        raise better from error
