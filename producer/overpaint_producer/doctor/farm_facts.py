"""What the ledger says of the farm: its jobs, its workers, its queues."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from overpaint_producer.doctor.findings import Unknown
from overpaint_producer.doctor.redis_facts import LEASES, QUARANTINE, asked, connect, user_of
from overpaint_shared import __version__
from overpaint_shared.catalogue import Catalogue
from overpaint_shared.errors import LedgerUnreachable
from overpaint_shared.ledger import JobState, Ledger, QueueState, WorkerRecord
from overpaint_shared.ledger.faults import typed_errors
from overpaint_shared.ledger.listing import clock

if TYPE_CHECKING:
    from overpaint_shared.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FarmFacts:
    """One farm."""

    version: str = __version__
    """Of this program."""
    lease_s: float = 20.0
    counts: Mapping[JobState, int] | Unknown = field(default_factory=dict)
    workers: Sequence[WorkerRecord] | Unknown = ()
    queues: Sequence[QueueState] | Unknown = ()
    quarantined: int | Unknown = 0
    overdue_s: float | Unknown = 0.0
    """For how long the lease that ended first has been over; 0: none is."""

    @property
    def catalogue(self) -> Catalogue:
        """What the live workers offer together."""
        return Catalogue.merge(() if isinstance(self.workers, Unknown) else self.workers)


def gather(settings: "Settings") -> FarmFacts:
    """Ask the ledger. Raises LedgerUnreachable."""
    shown, user = settings.redis_url.shown, user_of(settings.redis_url)
    with connect(settings) as client, typed_errors(shown):
        ledger = Ledger(client, settings.ledger())
        workers = _allowed(ledger.workers, "read the workers")
        served = set() if isinstance(workers, Unknown) else {name for each in workers for name in each.serves}
        return FarmFacts(
            lease_s=settings.lease_s,
            counts=_allowed(ledger.counts, "count the jobs"),
            workers=workers,
            queues=_allowed(lambda: ledger.queues(served), "read the queues"),
            quarantined=asked(lambda: int(client.llen("op:quarantine")), QUARANTINE, user),
            overdue_s=asked(lambda: _overdue_s(client), LEASES, user),
        )


def _overdue_s(client: Any) -> float:
    first = client.zrange("op:leases", 0, 0, withscores=True)
    return max(0.0, clock(client) - float(first[0][1])) if first else 0.0


def _allowed(ask: Callable[[], T], what: str) -> T | Unknown:
    """The ledger's answer, or that there is no right to it."""
    try:
        return ask()
    except LedgerUnreachable as error:
        if "denies its user a command" not in error.message:
            raise
        return Unknown(f"this user has no right to {what}")
