"""Redis' errors, made typed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.exceptions import (
    AuthenticationError,
    ClusterError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from overpaint_shared.errors import LedgerDamaged, LedgerDenied, LedgerFull, LedgerUnreachable, OverpaintError

_CLUSTER = re.compile(
    r"\b(MOVED|CROSSSLOT|CLUSTERDOWN|ASK)\b|non local key|cluster mode|slot not served", re.IGNORECASE
)
_NO_WRITES = re.compile(r"\b(BUSY|UNKILLABLE|NOREPLICAS|MASTERDOWN|UNBLOCKED)\b")
"""States of a server in which it takes no command, or no write; they pass, or an operator ends them."""
_FULL = "used memory > 'maxmemory'"


def address(client: redis.Redis) -> str:
    """Where `client` connects, without its password."""
    kwargs = client.connection_pool.connection_kwargs
    scheme = "rediss" if "Ssl" in client.connection_pool.connection_class.__name__.title() else "redis"
    return f"{scheme}://{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}/{kwargs.get('db', 0)}"


def typed(error: Exception, where: str) -> OverpaintError | None:
    """The typed error for what Redis at `where` raised; None: a defect of ours, let it through."""
    # A pipeline's error begins with its command, which holds a job's words.
    text = str(error).rsplit("of pipeline caused error: ", 1)[-1]
    if isinstance(error, AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        fix = "put user and password into the URL: redis://user:password@host:port/0"
        return _denied("refuses the password", where, fix)
    if isinstance(error, RedisConnectionError | RedisTimeoutError):
        return unreachable(text, where)
    if isinstance(error, NoPermissionError) or "ACL failure in script" in text:
        fix = "give the user the rights that docs/security.md lists"
        return _denied(f"denies its user a command: {text}", where, fix)
    if isinstance(error, NoScriptError):
        fix = "start a worker of this version: it loads the scripts; then try again"
        return _away("lacks the ledger's scripts, and this user may not load them", where, fix)
    return _refused(error, text, where) if isinstance(error, ResponseError) else None


def refuses_writes(error: Exception) -> bool:
    """Whether a server that is there says that it takes no writes now: this passes, as an absence does."""
    text = str(error)
    return isinstance(error, ReadOnlyError | MasterDownError | OutOfMemoryError) or (
        isinstance(error, ResponseError)
        and (_FULL in text or "MISCONF" in text or "READONLY" in text or bool(_NO_WRITES.search(text)))
    )


def unreachable(why: str, where: str) -> LedgerUnreachable:
    """Redis at `where` does not answer, or not as who it should be."""
    if "CERTIFICATE_VERIFY_FAILED" in why:
        fix = "name the authority's file in OVERPAINT_REDIS_CA_FILE, and the host as its certificate does"
        return _away(f"has a certificate that is not trusted: {why}", where, fix)
    fix = (
        "start Redis there, or a whole farm with `overpaint up`; of one that runs, name the "
        "configuration file (--config overpaint-data/farm.toml), or set OVERPAINT_REDIS_URL"
    )
    return _away(f"does not answer: {why}", where, fix)


def _refused(error: ResponseError, text: str, where: str) -> OverpaintError | None:
    if _FULL in text:
        return _full(
            "has reached its maxmemory", where, "raise maxmemory, or wait until jobs have ended and expired"
        )
    if "MISCONF" in text:
        return _full(f"cannot write its data to disk: {text}", where, "free disk space on its host")
    if isinstance(error, MasterDownError) or _NO_WRITES.search(text):
        fix = "see its log; a primary waits for its replicas, or a script keeps it busy"
        return _away(f"takes no writes now: {text}", where, fix)
    if isinstance(error, ClusterError) or _CLUSTER.search(text):
        fix = "use one Redis primary, with replicas if you like"
        return _away("is a Redis Cluster, which is not supported", where, fix)
    if "WRONGTYPE" in text or "not an integer" in text:
        message = f"Redis at {where} holds something else at a key of the ledger: {text}"
        return LedgerDamaged(
            message,
            field="redis_url",
            value=where,
            fix="try again: a worker's reaper puts it aside within seconds",
        )
    # The client takes the word off an answer, but not where a script's error quotes it.
    if isinstance(error, ReadOnlyError) or "READONLY" in text:
        return _away("is a read-only replica", where, "point OVERPAINT_REDIS_URL at the primary")
    return None


def _away(what: str, where: str, fix: str) -> LedgerUnreachable:
    return LedgerUnreachable(f"Redis at {where} {what}", field="redis_url", value=where, fix=fix)


def _denied(what: str, where: str, fix: str) -> LedgerDenied:
    return LedgerDenied(f"Redis at {where} {what}", field="redis_url", value=where, fix=fix)


def _full(what: str, where: str, fix: str) -> LedgerFull:
    return LedgerFull(f"Redis at {where} {what}", field="redis_url", value=where, fix=fix)


@contextmanager
def typed_errors(where: str) -> Iterator[None]:
    """Raise `LedgerUnreachable` or `LedgerFull` for what Redis raises inside."""
    try:
        yield
    except redis.RedisError as error:
        better = typed(error, where)
        if better is None:
            raise
        raise better from error
