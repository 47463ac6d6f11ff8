"""Celery's Redis transport, made to survive whatever lies in a queue and a Redis that refuses writes.

A stock worker dies of an item that is not JSON, and gets stuck on some that are. Here an item is read as
`messages.py` says; what names no job is put into a list for people to look at.

A stock worker also dies of an answer such as MISCONF, OOM, READONLY or NOREPLICAS. Here what Celery writes
for itself (acknowledgements, bindings, replies to remote control) is given up then: the ledger decides, and
none of it is needed. Reading goes on when Redis takes the next BRPOP, which is tried each second.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from time import monotonic
from typing import Any, ClassVar

import redis
import structlog
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport import redis as kombu_redis
from redis.exceptions import ReadOnlyError, ResponseError

from overpaint_shared.ledger.connections import PlainConnection, TlsConnection
from overpaint_shared.ledger.faults import refuses_writes
from overpaint_shared.queues import model_of
from overpaint_worker.cycle import Intake
from overpaint_worker.messages import NoMessage, parsed, rebuilt

QUARANTINE_KEY = "op:quarantine"
QUARANTINE_LENGTH = 100
QUARANTINE_ITEM_CHARS = 400
PAUSE_S = 1.0
"""After a refused BRPOP; as often as Celery's loop turns when nothing happens."""

# kombu's published types lack what its Redis transport has.
_Channel: Any = kombu_redis.Channel
_QoS: Any = kombu_redis.QoS
_Transport: Any = kombu_redis.Transport
_VirtualQoS: Any = virtual.QoS

log = structlog.get_logger(__name__)


class Refusals:
    """Whether Redis refuses what Celery writes. Logs the first refusal, and that it has ended."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._until = 0.0
        self.refusing = False

    def note(self, error: Exception) -> None:
        """Redis has refused something."""
        self._until = self._clock() + PAUSE_S
        if not self.refusing:
            log.warning("Redis refuses writes, waiting", action="broker.refuses", error=str(error))
        self.refusing = True

    def over(self) -> None:
        """Redis has taken a command that writes."""
        if self.refusing:
            log.info("Redis takes writes again", action="broker.accepts")
        self.refusing = False

    @property
    def pausing(self) -> bool:
        """It refused less than `PAUSE_S` ago."""
        return self.refusing and self._clock() < self._until

    @contextmanager
    def forgiven(self) -> Iterator[None]:
        """Do without what Redis refuses in this block."""
        try:
            yield
        except ResponseError as error:
            self.note(error)


REFUSALS = Refusals()


class PatientClient(redis.Redis):
    """A server that refuses PING is there: one that cannot write to its disk does so."""

    def ping(self, **options: Any) -> Any:
        """True if the server answers."""
        try:
            return super().ping(**options)
        except ResponseError as error:
            if not refuses_writes(error):
                raise
            return True


class SafeQoS(_QoS):  # type: ignore[misc]
    """Celery's list of what was taken and has not ended: in Redis if Redis takes it, else in memory alone."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a message."""
        try:
            super().append(message, delivery_tag)
        except ResponseError as error:
            REFUSALS.note(error)
            _VirtualQoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Forget a message. An entry that stays in Redis comes back after hours and finds nothing to do."""
        try:
            super().ack(delivery_tag)
        except ResponseError as error:
            REFUSALS.note(error)
            _VirtualQoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Forget or return a message; one that cannot be returned is published by the reaper."""
        try:
            super().reject(delivery_tag, requeue)
        except ResponseError as error:
            REFUSALS.note(error)
            _VirtualQoS.ack(self, delivery_tag)

    def restore_visible(self, *args: Any, **options: Any) -> None:
        """Tidy up after dead workers, now or later."""
        with REFUSALS.forgiven():
            super().restore_visible(*args, **options)


class SafeChannel(_Channel):  # type: ignore[misc]
    """Puts items that are no messages aside, and does without what Redis refuses."""

    QoS = SafeQoS
    connection_class = PlainConnection
    connection_class_ssl = TlsConnection

    # Nothing goes back to its queue when a connection is lost: what was taken runs on under its lease, and
    # what is given up is published anew. kombu's own way of putting it back fails, and ends the worker, where
    # the connection is gone already or a thread acknowledges at that moment.
    do_restore = False

    # Taking

    def _get_client(self) -> type[redis.Redis]:
        return PatientClient

    def _brpop_start(self, timeout: float | None = None) -> None:
        if not REFUSALS.pausing:
            super()._brpop_start(timeout)

    def _brpop_read(self, **options: Any) -> bool:
        """As kombu's, but the item is ours to parse, and a refusal is no defect."""
        try:
            reply = self._popped(options)
            if not reply:
                raise Empty
            key, item = reply
            queue = key.decode(errors="replace").rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            self._received(item, queue)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _popped(self, options: dict[str, Any]) -> Any:
        connection = self.client.connection
        try:
            reply = self.client.parse_response(connection, "BRPOP", **options)
        except self.connection_errors:
            connection.disconnect()
            raise
        except ResponseError as error:
            REFUSALS.note(error)
            if isinstance(error, ReadOnlyError):
                connection.disconnect()  # the name may stand for another server by now
            if "WRONGTYPE" in str(error):
                self._clear_queues()
            raise Empty from None
        REFUSALS.over()
        return reply

    def _received(self, item: bytes, queue: str) -> None:
        try:
            message = parsed(item)
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too long
            self.set_aside(item, error)
            raise Empty from None
        self.connection._deliver(message, queue)  # noqa: SLF001  # kombu's own way from a channel

    def _clear_queues(self) -> None:
        """Remove what stands in a queue's place and is no list: nothing could be read while it is there."""
        keys = [self._q_for_pri(queue, step) for queue in self.active_queues for step in self.priority_steps]
        with REFUSALS.forgiven(), self.conn_or_acquire() as client:
            for key in keys:
                if (kind := client.type(key)) not in (b"list", b"none"):
                    self.set_aside(key, NoMessage(f"a {kind.decode()} in the place of a queue"))
                    client.delete(key)

    def _receive_one(self, client: Any) -> Any:
        """A message of remote control: one that Celery cannot read is put aside, too."""
        try:
            return super()._receive_one(client)
        except Empty:
            raise
        except ResponseError as error:  # the answer to a PING
            REFUSALS.note(error)
        except Exception as error:
            if isinstance(error, self.connection_errors) and not isinstance(error, KeyError):
                raise
            self.set_aside("a message of remote control", error)
        raise Empty

    # Celery's own writes

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> list[str]:
        """Answers of remote control go to the queue of whoever asked, whatever the table in Redis says."""
        found: list[str] = super()._lookup(exchange, routing_key, default)
        if not exchange.startswith("reply."):
            return found
        return [queue for queue in found if queue == f"{routing_key}.{exchange}"]

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Acknowledge, unless the connection that brought the message is gone: its entry then runs out."""
        if not self.closed:
            super().basic_ack(delivery_tag, multiple)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Reject, unless the connection is gone: the reaper sends another message."""
        if not self.closed:
            super().basic_reject(delivery_tag, requeue)

    def _queue_bind(self, *args: Any) -> None:
        with REFUSALS.forgiven():  # neither our queues nor remote control are looked up there
            super()._queue_bind(*args)

    def _size(self, queue: str) -> int:
        with REFUSALS.forgiven():
            return int(super()._size(queue))
        return 0

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        try:
            super()._put(queue, message, **options)
        except ResponseError as error:
            if model_of(queue) is not None:  # a wake-up: its sender must know
                raise
            REFUSALS.note(error)

    def _delete(self, *args: Any, **options: Any) -> None:
        with REFUSALS.forgiven():
            super()._delete(*args, **options)

    # Putting aside

    def set_aside(self, item: object, error: Exception) -> None:
        """Keep the last items that were no messages, for people to look at."""
        reason = f"{type(error).__name__}: {error}"[:QUARANTINE_ITEM_CHARS]
        log.warning("message quarantined", action="message.quarantined", reason=reason, list=QUARANTINE_KEY)
        shown = item[:QUARANTINE_ITEM_CHARS] if isinstance(item, str | bytes) else item
        record = json.dumps({"reason": reason, "item": repr(shown)[:QUARANTINE_ITEM_CHARS]})
        with REFUSALS.forgiven(), self.conn_or_acquire() as client:
            client.lpush(QUARANTINE_KEY, record)
            client.ltrim(QUARANTINE_KEY, 0, QUARANTINE_LENGTH - 1)

    def put_back(self, envelope: dict[str, Any], queue: str) -> None:
        """Return a message to the front of its queue: the BRPOP that brought it was sent before the worker
        closed. Where Redis refuses that, the reaper sends another.
        """
        key = self._q_for_pri(queue, envelope["properties"]["priority"])
        with REFUSALS.forgiven(), self.conn_or_acquire() as client:
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
        except Exception as error:  # no item may end the worker, whatever it makes our code raise
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


__all__ = ["QUARANTINE_KEY", "SafeChannel", "SafeTransport", "install"]
