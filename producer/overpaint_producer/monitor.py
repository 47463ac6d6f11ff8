"""The Celery app that Flower opens: `celery --app overpaint_producer.monitor flower`.

Its Redis user may run no scripts, so that nobody who steals its password can keep the server busy with one.
What kombu does by scripts is done by commands here, or left to the workers.
"""

import time
from collections.abc import Sequence
from typing import Any

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis

from overpaint_shared.queues import make_app
from overpaint_shared.settings import Settings

# kombu's published types lack what its Redis transport has.
_Channel: Any = kombu_redis.Channel
_Transport: Any = kombu_redis.Transport


class WatchingChannel(_Channel):  # type: ignore[misc]
    """Takes answers and events, and never a job."""

    ack_emulation = False
    """So no message waits for an acknowledgement, and there is none to give back."""

    @property
    def _refresh_binding(self) -> Any:
        return refresh_binding

    def sweep_bindings(self, limit: int = 100) -> int:  # noqa: ARG002  # kombu's signature
        """Workers do it."""
        return 0


def refresh_binding(keys: Sequence[str], args: Sequence[Any], client: Any) -> None:
    """As kombu's script: a queue is bound to an exchange, whose table is kept for a while."""
    table, deadlines = keys
    member, exchange, ttl_ms = args
    client.sadd(table, member)
    client.zadd(deadlines, {exchange: int(time.time() * 1000) + int(ttl_ms)}, gt=True)


class WatchingTransport(_Transport):  # type: ignore[misc]
    """The Redis transport of Flower."""

    Channel = WatchingChannel


def install() -> None:
    """Make Redis URLs of this process use `WatchingTransport`; `rediss://` keeps its TLS."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{WatchingTransport.__name__}"


install()
app: Celery = make_app(Settings.load().redis_url)
