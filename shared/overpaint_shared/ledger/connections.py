"""Connections to Redis that survive a server which answers and refuses.

redis-py sends a PING on a connection that was idle, before the next command. A server that cannot write to
its disk refuses that PING, and with it a command that only reads would fail. That it answers is all that the
PING is to show.
"""

from typing import TYPE_CHECKING, Any

import redis
from redis.exceptions import ResponseError

from overpaint_shared.ledger.faults import refuses_writes

if TYPE_CHECKING:
    _Base: Any = redis.Connection
else:
    _Base = object


class _Answering(_Base):  # type: ignore[misc]
    def _send_ping(self) -> None:
        try:
            super()._send_ping()
        except ResponseError as error:
            if not refuses_writes(error):
                raise


class PlainConnection(_Answering, redis.Connection):
    """Over TCP."""


class TlsConnection(_Answering, redis.SSLConnection):
    """Over TLS."""


def tolerate_refused_pings(client: redis.Redis) -> None:
    """Make a client's later connections `_Answering` ones."""
    pool = client.connection_pool
    if pool.connection_class is redis.Connection:
        pool.connection_class = PlainConnection
    elif pool.connection_class is redis.SSLConnection:
        pool.connection_class = TlsConnection
