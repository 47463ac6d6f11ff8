"""One examination: gather the facts within a time limit, then check them."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from overpaint_producer.doctor import (
    check_farm,
    check_local,
    check_server,
    check_store,
    check_users,
    farm_facts,
    local_facts,
    redis_facts,
    store_facts,
)
from overpaint_producer.doctor.findings import Finding, Level, wrong
from overpaint_shared.errors import OverpaintError

if TYPE_CHECKING:
    from overpaint_shared.settings import Settings

T = TypeVar("T")
LIMIT_S: Final = 15.0


@dataclass(frozen=True)
class Examination:
    """What was found, and whether any service answered."""

    findings: tuple[Finding, ...]
    reached: bool

    @property
    def healthy(self) -> bool:
        """Nothing is wrong."""
        return not any(finding.level is Level.WRONG for finding in self.findings)


class Gathering(Generic[T]):
    """Facts that are being gathered in a thread of their own, which may hang for all that it likes."""

    def __init__(self, name: str, gather: Callable[[], T]) -> None:
        self._gather = gather
        self._facts: T | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"doctor-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._facts = self._gather()
        except Exception as error:  # told as a finding
            self._error = error

    def facts(self, check: str, what: str, until: float, limit_s: float) -> T | Finding:
        """The facts, or why there are none."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._facts is not None:
            return self._facts
        if self._error is None:
            fix = f"see whether {what} hangs; a frozen or overloaded server accepts connections and is silent"
            return wrong(check, f"{what} has not answered within {limit_s:g} s", fix)
        if isinstance(self._error, OverpaintError):
            return wrong(check, self._error.message, self._error.fix or "see its log")
        return wrong(check, f"{what}: {type(self._error).__name__}: {self._error}", "see its log")


def examine(settings: "Settings", limit_s: float = LIMIT_S) -> Examination:
    """Look at everything that these settings reach; at most `limit_s` seconds."""
    until = time.monotonic() + limit_s
    redis = Gathering("redis", lambda: redis_facts.gather(settings))
    farm = Gathering("farm", lambda: farm_facts.gather(settings))
    store = Gathering("store", lambda: store_facts.gather(settings))
    local = Gathering("local", lambda: local_facts.gather(settings))
    server_facts = redis.facts("redis.reachable", "Redis", until, limit_s)
    known_store = store.facts("s3.reachable", "the S3 server", until, limit_s)
    findings: list[Finding] = []
    if isinstance(server_facts, Finding):
        findings.append(server_facts)
    else:
        findings += [*check_server.check(server_facts), *check_users.check(server_facts)]
        findings += _checked(farm.facts("farm", "the ledger in Redis", until, limit_s), check_farm.check)
    findings += _checked(known_store, check_store.check)
    findings += _checked(local.facts("local", "this machine", until, limit_s), check_local.check)
    reached = not (isinstance(server_facts, Finding) and isinstance(known_store, Finding))
    return Examination(tuple(findings), reached)


def _checked(facts: T | Finding, check: Callable[[T], Iterator[Finding]]) -> list[Finding]:
    return [facts] if isinstance(facts, Finding) else list(check(facts))
