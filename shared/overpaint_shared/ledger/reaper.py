"""Mending what died. Any number of reapers may run; each call does a bounded amount of work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis

from overpaint_shared.errors import UnsupportedError
from overpaint_shared.ledger import listing, wire
from overpaint_shared.ledger.records import Reaped, Wakeup, WorkerRecord
from overpaint_shared.ledger.scripts import Scripts
from overpaint_shared.setting_views import LedgerSettings

_LANES: Final = 64  # lanes visited in one call, least recently visited first
_JOBS: Final = 256  # jobs changed in one step of one call


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A queued job that some worker could not render."""

    id: str
    model: str
    features: frozenset[str]
    excluded: frozenset[str]
    unable_s: float
    fault: str


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
            return Reaped(holding=True) if self._holding(now) else self._round()
        except redis.RedisError:
            self._held_until = now + self._settings.lease_s
            raise

    def _round(self) -> Reaped:
        settings = self._settings
        expired, due = self._scripts.run(
            "expire", settings.window, settings.max_lost_hosts, settings.keep_failed_s, _JOBS
        )
        stale, tended, suspects, lanes = self._scripts.run(
            "tend", settings.window, settings.reap_grace_s, settings.age_s, _LANES, _JOBS
        )
        unable, failed = self._fail_unable(_suspects(suspects), lanes)
        self._scripts.run("sweep", _JOBS)
        return Reaped(
            expired=tuple(expired),
            stale=tuple(stale),
            unable=tuple(unable),
            wakeups=(*wire.wakeups(due), *wire.wakeups(tended), *failed),
        )

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

    def _fail_unable(
        self, suspects: Sequence[_Suspect], lanes: Sequence[str]
    ) -> tuple[list[str], tuple[Wakeup, ...]]:
        """Fail what no live worker has been able to render for `unable_after_s`."""
        live = listing.workers(self._client)
        if not live:  # nobody to judge by
            return [], ()
        failed: list[str] = []
        due: tuple[Wakeup, ...] = ()
        for ids, error in (*self._lacking(suspects, live), *self._unserved(lanes, live)):
            done, more = self._scripts.run(
                "fail", self._settings.window, self._settings.keep_failed_s, error.to_json(), *ids
            )
            failed += done
            due += wire.wakeups(more)
        return failed, due

    def _lacking(
        self, suspects: Sequence[_Suspect], live: Sequence[WorkerRecord]
    ) -> list[tuple[list[str], UnsupportedError]]:
        late = [one for one in suspects if one.unable_s >= self._settings.unable_after_s]
        return [([one.id], _unsupported(one, live)) for one in late if not _able(one, live)]

    def _unserved(
        self, lanes: Sequence[str], live: Sequence[WorkerRecord]
    ) -> list[tuple[list[str], UnsupportedError]]:
        """Jobs of models whose queue no live worker has read for `unable_after_s` of being watched."""
        served = {model for worker in live for model in worker.serves}
        waiting = {lane.split(":", 2)[1] for lane in lanes}
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
            (ids, _no_worker(model, served))
            for model in overdue
            if (ids := self._client.zrange(f"op:queued:{model}", 0, _JOBS - 1))
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
