"""What Redis says of itself, as far as its user may ask."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, ResponseError
from redis.retry import Retry

from overpaint_producer.doctor.findings import Unknown
from overpaint_shared.ledger.faults import typed_errors
from overpaint_shared.ledger.listing import clock
from overpaint_shared.ledger.scripts import NAMES, PRODUCERS, sha, source

if TYPE_CHECKING:
    from overpaint_shared.settings import Settings

T = TypeVar("T")
PINGS: Final = 7
ANSWER_S: Final = 5.0
LOAD = "load scripts"
CONFIG, USERS, LEASES, QUARANTINE = "CONFIG GET", "ACL LIST", "read the leases", "read what was put aside"
NO_RIGHT: Final = {
    CONFIG: ("producer", "worker", "monitor"),
    USERS: ("producer", "worker", "monitor"),
    LEASES: ("producer", "monitor"),
    QUARANTINE: ("producer",),
    LOAD: ("producer",),
}
"""What users of deploy/valkey/users.acl.template may not do. The server's ACL LOG would keep each refusal."""
LOOPBACK: Final = ("localhost", "127.", "::1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class RedisFacts:
    """One Redis or Valkey."""

    address: str
    """Without its password."""
    user: str = "default"
    info: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, str] | Unknown = field(default_factory=dict)
    users: Sequence[str] | Unknown = ()
    latency_s: float = 0.0
    clock_ahead_s: float = 0.0
    """How much this machine's clock is ahead of the server's."""
    scripts: int | str | Unknown = 0
    """How many of the ledger's scripts were taken, or why not."""

    @property
    def is_local(self) -> bool:
        """Only this machine reaches it by this address."""
        return is_loopback(urlsplit(self.address).hostname or "")

    @property
    def is_encrypted(self) -> bool:
        """The connection uses TLS."""
        return self.address.startswith("rediss:")

    @property
    def name(self) -> str:
        """Redis or Valkey, with its version."""
        valkey = self.info.get("valkey_version")
        return f"Valkey {valkey}" if valkey else f"Redis {self.info.get('redis_version', '?')}"


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own."""
    return host.startswith(LOOPBACK)


def user_of(url: str) -> str:
    """The user that a URL names."""
    return urlsplit(url).username or "default"


def connect(settings: "Settings") -> "redis.Redis":
    """A client that gives up soon."""
    return redis.Redis.from_url(
        settings.redis_url,
        decode_responses=True,
        socket_timeout=ANSWER_S,
        socket_connect_timeout=3.0,
        retry=Retry(NoBackoff(), 0),
    )


def gather(settings: "Settings") -> RedisFacts:
    """Ask the server. Raises LedgerUnreachable."""
    shown, user = settings.redis_url.shown, user_of(settings.redis_url)
    with connect(settings) as client, typed_errors(shown):
        client.ping()
        latency_s, ahead_s = _clock(client)
        return RedisFacts(
            address=shown,
            user=user,
            info=_all_info(client),
            config=asked(lambda: dict(client.config_get("*")), CONFIG, user),
            users=asked(lambda: [str(line) for line in client.acl_list()], USERS, user),
            latency_s=latency_s,
            clock_ahead_s=ahead_s,
            scripts=_scripts(client, user),
        )


def asked(ask: Callable[[], T], what: str, user: str = "") -> T | Unknown:
    """The answer, or that there is no right to it. A shipped `user` without it is not even asked."""
    if user in NO_RIGHT.get(what, ()):
        return Unknown(f"the user {user} has no right to {what}")
    try:
        return ask()
    except NoPermissionError:
        return Unknown(f"this user has no right to {what}")
    except ResponseError as error:
        return Unknown(f"the server does not know {what}: {error}")


def _all_info(client: Any) -> dict[str, Any]:
    info = asked(client.info, "INFO")
    return {} if isinstance(info, Unknown) else dict(info)


def _clock(client: Any) -> tuple[float, float]:
    """(seconds for an answer, how much our clock is ahead), by the quickest of several answers."""
    took: list[float] = []
    ahead: list[float] = []
    for _ in range(PINGS):
        began, asked_at = time.perf_counter(), time.time()
        server = clock(client)
        took.append(time.perf_counter() - began)
        ahead.append(asked_at + took[-1] / 2 - server)
    return median(took), ahead[took.index(min(took))]


def _scripts(client: Any, user: str) -> int | str | Unknown:
    """How many of the ledger's scripts the server has or takes; a producer may load none."""
    names = PRODUCERS if user in NO_RIGHT[LOAD] else NAMES
    there = asked(lambda: client.script_exists(*map(sha, names)), "SCRIPT EXISTS")
    if isinstance(there, Unknown):
        return there
    missing = [name for name, known in zip(names, there, strict=True) if not known]
    if missing and user in NO_RIGHT[LOAD]:
        return f"it lacks {', '.join(missing)}, and only workers load them"
    try:
        for name in missing:
            client.script_load(source(name))
    except ResponseError as error:
        return str(error)
    return len(names)
