"""Mending what died. Any number of reapers may run; each call does a bounded amount of work."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import redis
from redis.exceptions import ResponseError

from overpaint_shared.errors import LedgerFull, LedgerUnreachable, UnsupportedError
from overpaint_shared.ledger import listing, roster, wire
from overpaint_shared.ledger.faults import typed
from overpaint_shared.ledger.listing import queued_index
from overpaint_shared.ledger.records import Reaped, Wakeup, WorkerRecord
from overpaint_shared.ledger.scripts import Scripts
from overpaint_shared.setting_views import LedgerSettings

_LANES: Final = 64  # lanes visited in one call, least recently visited first
_JOBS: Final = 256  # jobs changed in one step of one call
_LAP: Final = 0.8  # of a round: a lane that another reaper visited since then is left to it
_PIECE: Final = 32  # entries of each index looked at in one call


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A queued job that some worker could not render."""

    id: str
    model: str
    features: frozenset[str]
    excluded: frozenset[str]
    unable_s: float
    fault: str


@dataclass(slots=True)
class _Findings:
    """What one round has found so far."""

    expired: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    unable: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    wakeups: list[Wakeup] = field(default_factory=list)
    suspects: list[_Suspect] = field(default_factory=list)
    lanes: list[str] = field(default_factory=list)

    def take(self, due: Sequence[Any], odd: Sequence[str]) -> None:
        """Keep the wake-ups of a script, and what it put aside."""
        self.wakeups += wire.wakeups(due)
        self.odd += odd


class Reaper:
    """The reaper of one process; it remembers when Redis was away."""

    def __init__(self, client: listing.Client, scripts: Scripts, settings: LedgerSettings) -> None:
        self._client = client
        self._scripts = scripts
        self._settings = settings
        self._asked: float | None = None  # when the last call began
        self._held_until = 0.0

    def reap(self, now: float) -> Reaped:
        """One round at `now` (monotonic seconds)."""
        try:
            self._scripts.keep()  # first, since producers wait for it
            return Reaped(holding=True) if self._holding(now) else self._round()
        except redis.RedisError:
            self._held_until = now + self._settings.lease_s
            raise

    def _round(self) -> Reaped:
        """Each step by itself: one that Redis refuses because of what it holds keeps none of the others."""
        found = _Findings()
        for step in (self._expire, self._late, self._tend, self._scrub, self._fail_unable, self._sweep):
            try:
                step(found)
            except ResponseError as error:
                if isinstance(typed(error, ""), LedgerUnreachable | LedgerFull):
                    raise  # the server's state, not an entry's
                found.odd.append(f"{step.__name__.strip('_')}: {error}")
        return Reaped(
            expired=tuple(found.expired),
            unnamed=tuple(found.unnamed),
            stale=tuple(found.stale),
            unable=tuple(found.unable),
            late=tuple(found.late),
            mended=tuple(found.mended),
            odd=tuple(found.odd),
            wakeups=tuple(found.wakeups),
        )

    def _expire(self, found: "_Findings") -> None:
        settings = self._settings
        expired, due, odd, unnamed = self._scripts.run(
            "expire",
            settings.window,
            settings.max_lost_hosts,
            settings.keep_failed_s,
            _JOBS,
            settings.lease_s,
        )
        found.expired += expired
        found.unnamed += unnamed
        found.take(due, odd)

    def _late(self, found: "_Findings") -> None:
        settings = self._settings
        late, due, odd = self._scripts.run("late", settings.window, settings.keep_failed_s, _JOBS)
        found.late += late
        found.take(due, odd)

    def _tend(self, found: "_Findings") -> None:
        settings = self._settings
        every_s = _LAP * min(settings.reap_s, settings.reap_grace_s)
        stale, due, suspects, lanes, odd = self._scripts.run(
            "tend", settings.window, settings.reap_grace_s, every_s, settings.age_s, _LANES, _JOBS
        )
        found.stale += stale
        found.suspects += _suspects(suspects)
        found.lanes += lanes
        found.take(due, odd)

    def _scrub(self, found: "_Findings") -> None:
        settings = self._settings
        mended, odd = self._scripts.run(
            "scrub", settings.reap_s, settings.lease_s, settings.keep_failed_s, _PIECE
        )
        found.mended += mended
        found.take((), odd)

    def _sweep(self, found: "_Findings") -> None:
        _, odd = self._scripts.run("sweep", _JOBS)
        found.take((), odd)

    def _holding(self, now: float) -> bool:
        """Whether Redis was away less than a lease ago: an error, silence of ours, or a young server.

        A server that refuses writes is away, also while this reaper holds: else it would hold for one lease
        from the first refusal and not from the last.
        """
        lease_s = self._settings.lease_s
        silence_s = max(lease_s / 2, 2 * self._settings.reap_s)
        if self._asked is not None and now - self._asked > silence_s:
            self._held_until = now + lease_s
        self._asked = now
        self._client.delete("op:nothing")
        uptime_s = self._client.info("server")["uptime_in_seconds"]
        return uptime_s < lease_s or now < self._held_until

    def _fail_unable(self, found: "_Findings") -> None:
        """Fail what no live worker has been able to render for `unable_after_s`."""
        live, odd = roster.workers(self._client, tidy=True)
        for worker_id, why in odd.items():
            roster.put_aside(self._client, worker_id, why)
            found.odd.append(f"op:worker:{worker_id} {why}")
        if not live:  # nobody to judge by
            return
        for index, ids, error in (*self._lacking(found.suspects, live), *self._unserved(found.lanes, live)):
            failed, due, strange = self._scripts.run(
                "fail", index, self._settings.window, self._settings.keep_failed_s, error.to_json(), *ids
            )
            found.unable += failed
            found.take(due, strange)

    def _lacking(
        self, suspects: Sequence[_Suspect], live: Sequence[WorkerRecord]
    ) -> list[tuple[str, list[str], UnsupportedError]]:
        late = [one for one in suspects if one.unable_s >= self._settings.unable_after_s]
        return [
            (queued_index(one.model), [one.id], _unsupported(one, live))
            for one in late
            if not _able(one, live)
        ]

    def _unserved(
        self, lanes: Sequence[str], live: Sequence[WorkerRecord]
    ) -> list[tuple[str, list[str], UnsupportedError]]:
        """Jobs of models whose queue no live worker has read for `unable_after_s` of being watched."""
        served = {model for worker in live for model in worker.serves}
        waiting = {found.model for lane in lanes if (found := wire.lane(lane)) is not None}
        # Times in which no reaper looked do not count: an idle farm's workers come back one by one.
        gap_s = max(self._settings.lease_s, 2 * self._settings.reap_s)
        overdue = self._scripts.run(
            "unserved",
            gap_s,
            self._settings.unable_after_s,
            len(waiting - served),
            *sorted(waiting - served),
            *sorted(served),
        )
        return [
            (queued_index(model), ids, _no_worker(model, served))
            for model in overdue
            if (ids := self._client.zrange(queued_index(model), 0, _JOBS - 1))
        ]


def _suspects(flat: Sequence[Any]) -> list[_Suspect]:
    rows = (flat[at : at + 6] for at in range(0, len(flat), 6))
    return [
        _Suspect(
            job,
            model,
            frozenset(filter(None, features.split(","))),
            frozenset(excluded.split(",")),
            float(unable_s),
            fault,
        )
        for job, model, features, excluded, unable_s, fault in rows
    ]


def _able(suspect: _Suspect, live: Sequence[WorkerRecord]) -> bool:
    return any(
        suspect.model in worker.serves
        and worker.id not in suspect.excluded
        and suspect.features <= worker.features
        for worker in live
    )


def _unsupported(suspect: _Suspect, live: Sequence[WorkerRecord]) -> UnsupportedError:
    """Why no live worker can render `suspect`: what all of them lack, else what the last one said."""
    readers = [worker for worker in live if suspect.model in worker.serves]
    offered = frozenset[str]().union(*(worker.features for worker in readers))
    if missing := sorted(suspect.features - offered):
        return UnsupportedError(
            f"no live worker of model {suspect.model} can render {', '.join(missing)}",
            value=missing[0],
            fix="start a worker of a newer version, or leave that out of the job",
        )
    return UnsupportedError(
        f"every live worker of model {suspect.model} has refused the job: {suspect.fault or 'unable'}",
        field="model",
        value=suspect.model,
        fix="start a worker that can render it",
    )


def _no_worker(model: str, served: set[str]) -> UnsupportedError:
    return UnsupportedError(
        f"no live worker serves model {model}; served: {', '.join(sorted(served)) or 'none'}",
        field="model",
        value=model,
        fix=f"start a worker with --models {model}, then replay the job",
    )
