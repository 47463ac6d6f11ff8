"""The ledger: the truth about every job, in Redis.

A Celery message only wakes a worker; whether a job may be rendered, by whom, and whether its result counts,
is decided here, by Lua scripts that each make one change whole and publish it. Every call may be repeated:
a call whose reply was lost is asked again and gives the same answer.

One Redis primary. Redis Cluster is not supported, and a failover may lose the last acknowledged writes.
"""

import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from overpaint_shared.errors import OverpaintError, UnknownJob
from overpaint_shared.ledger import audit, census, history, inputs, listing, quotas, roster, wire
from overpaint_shared.ledger.connections import tolerate_refused_pings
from overpaint_shared.ledger.events import Events
from overpaint_shared.ledger.faults import address, typed_errors
from overpaint_shared.ledger.reaper import Reaper
from overpaint_shared.ledger.records import (
    Beat,
    CancelledMany,
    Claim,
    Count,
    Done,
    Failed,
    Finished,
    History,
    JobRecord,
    Outcome,
    Place,
    QueueState,
    Reaped,
    Released,
    ReleaseReason,
    Renewal,
    Submission,
    Submitted,
    Wakeup,
    WorkerRecord,
)
from overpaint_shared.ledger.scripts import Scripts
from overpaint_shared.ledger.states import JobState, next_step
from overpaint_shared.setting_views import LedgerSettings

if TYPE_CHECKING:
    from overpaint_shared.catalogue import Catalogue

_PIPELINE: Final = 500
_RETRIES: Final = 4

MEMORY_REST_S = 30.0
"""How long a worker that had too little memory for a job is not asked for it, at most."""


class Ledger:
    """One face for producers, workers and the reaper. Safe to share between threads.

    Every method raises `LedgerUnreachable` when Redis does not answer (after short retries) and `LedgerFull`
    when it has no memory left. Calls that end or renew a job still work in a full Redis.
    """

    def __init__(self, client: redis.Redis, settings: LedgerSettings, *, acts_for: str | None = None) -> None:
        """`client` must decode its responses (`decode_responses=True`); `connect` makes such a one.

        `acts_for` is the owner that the audit trail names as the one for whom this program works.
        """
        if not client.get_encoder().decode_responses:
            raise ValueError("the ledger needs a Redis client with decode_responses=True")
        self._client = client
        self._settings = settings
        self._where = address(client)
        self._scripts = Scripts(client)
        self._audit = audit.Auditor(self._scripts, acts_for)
        self._reaper = Reaper(client, self._scripts, settings)

    @classmethod
    def connect(cls, redis_url: str, settings: LedgerSettings, *, acts_for: str | None = None) -> "Ledger":
        """A ledger at `redis_url`. Nothing is sent before the first call."""
        client = redis.Redis.from_url(
            redis_url,
            decode_responses=True,
            encoding_errors="replace",  # a record's bytes may be anything
            socket_timeout=5.0,
            socket_connect_timeout=3.0,
            socket_keepalive=True,
            health_check_interval=10,
            retry=Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.05), _RETRIES),
            retry_on_error=[RedisConnectionError, RedisTimeoutError],
        )
        tolerate_refused_pings(client)
        return cls(client, settings, acts_for=acts_for)

    def __repr__(self) -> str:
        return f"Ledger({self._where!r})"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ping(self) -> None:
        """Raise unless Redis answers and can be read. No PING: a server with a full disk refuses it."""
        with typed_errors(self._where):
            listing.refuse_cluster(self._client)

    def load_scripts(self) -> None:
        """Give Redis the ledger's scripts if it lacks them: producers may run scripts, but load none."""
        with typed_errors(self._where):
            self._scripts.load()

    # Producers ------------------------------------------------------------

    def submit(self, items: Iterable[Submission]) -> list[Submitted]:
        """Queue jobs; answers in the order of `items`. Publish the wake-ups of all of them.

        A token that stands for the same spec gives the job that is there. Those that stand for another spec
        raise one `SubmitConflict` (a `TokenConflict`) after everything else was submitted. A job whose stored
        inputs may have been deleted since it was `checked` raises `InputsGone`, and a limit of the owner
        (jobs waiting, their bytes, submits a second) that is reached `QuotaExceeded`. Each of them is a
        `PartlySubmitted`: it holds the answers of the jobs that were submitted, and the ids of all others.
        """
        found = wire.Answers()
        for chunk in wire.chunks(items, _PIPELINE):
            found.add(self._submit_chunk(chunk))
        return found.submitted()

    def _submit_chunk(self, chunk: Sequence[Submission]) -> "wire.Answers":
        """Submit jobs, and their line of the audit trail, in one pipeline."""
        ids = [item.id for item in chunk]
        owner, group = wire.common(item.owner for item in chunk), wire.common(item.group for item in chunk)
        calls = [("submit", self._submission(item)) for item in chunk]
        with typed_errors(self._where):
            *replies, noted = self._scripts.run_many([*calls, self._audit.submits(ids, owner, group)])
        found = wire.Answers.of(chunk, replies)
        if noted == audit.LEFT:
            made = sum(answer.created for answer in found.done)
            self._audit.note("submit", ids, owner=owner, group=group, result=found.result, changed=made)
        else:
            self._audit.told("submit", len(ids), noted)
        return found

    def _submission(self, item: Submission) -> list[object]:
        return wire.submission(item, self._settings.window)

    def now(self) -> float:
        """The time of Redis."""
        with typed_errors(self._where):
            return listing.clock(self._client)

    def cancel(self, job_id: str) -> Released:
        """Stop a job: a queued one is `cancelled` at once, a running one `cancelling` until confirmed.

        A job that has ended stays as it is, and so does one whose result is committed and whose picture only
        waits for its name. A job whose result is committed before its worker sees the cancel ends `done`.
        `state` is None where there is no record.
        """
        cancelled = self.cancel_all([job_id])
        return Released(cancelled.states[job_id], cancelled.wakeups)

    def cancel_all(self, job_ids: Sequence[str]) -> CancelledMany:
        """Stop many jobs, in this order; see `cancel`. Give those first that were submitted last.

        No other job takes a place in the queue before all of these are stopped, so few of them have a message
        that is then without work.
        """
        states: dict[str, JobState | None] = {}
        lanes: list[str] = []
        due: tuple[Wakeup, ...] = ()
        for start in range(0, len(job_ids), _PIPELINE):
            chunk, last = job_ids[start : start + _PIPELINE], start + _PIPELINE >= len(job_ids)
            window, keep_s = self._settings.window, self._settings.keep_failed_s
            now, more, free, noted = self._run(
                "cancel", self._audit.who, window, keep_s, "1" if last else "", len(lanes), *lanes, *chunk
            )
            self._audit.told("cancel", len(chunk), noted, "ok" if any(now) else UnknownJob.code)
            states |= {
                job_id: JobState(state) if state else None for job_id, state in zip(chunk, now, strict=True)
            }
            lanes, due = free, (*due, *wire.wakeups(more))
        return CancelledMany(states, due)

    def replay(self, job_id: str) -> tuple[Wakeup, ...]:
        """Queue a failed or dead job again, its counts reset, its fencing token not.

        Raises `UnknownJob` without a record, and `OverpaintError` where the job has not failed.
        """
        state, moved, due, noted = self._run("replay", job_id, self._settings.window, self._audit.who)
        self._audit.told("replay", 1, noted, wire.result(state, moved))
        if not state:
            raise UnknownJob(f"there is no job {job_id}", field="job", value=job_id)
        if not int(moved) and state != JobState.QUEUED:
            raise OverpaintError(
                f"job {job_id} is {state}; only a failed or dead job can be replayed",
                field="job",
                value=job_id,
                fix=next_step(JobState(state), job_id),
            )
        return wire.wakeups(due)

    def discard(self, job_id: str) -> JobState:
        """Remove the record of a failed or dead job; its state before. What it stored is the caller's.

        Raises `UnknownJob` without a record, and `OverpaintError` where the job has not failed.
        """
        state, removed, noted = self._run("discard", job_id, self._audit.who)
        self._audit.told("discard", 1, noted, wire.result(state, removed))
        if not state:
            raise UnknownJob(f"there is no job {job_id}", field="job", value=job_id)
        if not int(removed):
            raise OverpaintError(
                f"job {job_id} is {state}; only a failed or dead job can be discarded",
                field="job",
                value=job_id,
                fix=next_step(JobState(state), job_id),
            )
        return JobState(state)

    def note_fetch(self, action: str, job_id: str, record: JobRecord | None, result: str = "ok") -> None:
        """Tell the audit trail of a call that gives a job's files (`get`) or their addresses (`links`)."""
        owner, group = (record.owner, record.group or "") if record else ("", "")
        name = wire.picture_name(record.spec_json) if record else ""
        self._audit.note(action, [job_id], owner=owner, group=group, name=name, result=result)

    # Workers ------------------------------------------------------------

    def claim(
        self,
        job_id: str,
        worker_id: str,
        features: Collection[str] | None = None,
        models: Collection[str] | None = None,
        *,
        call: str | None = None,
    ) -> Claim:
        """Take a job for `worker_id`, which can render `features` and `models` (None: anything).

        A job that needs a feature which is not here is left for others, and this worker noted as unable. A
        live lease is busy for everyone, its own worker included. `call` names this claim: one that is made
        again under the same name after an error gets what the first one was given.
        """
        reply = self._run(
            "claim",
            job_id,
            worker_id,
            call or uuid.uuid4().hex,  # a repeated call is known by it
            self._settings.lease_s,
            self._settings.window,
            self._settings.keep_failed_s,
            wire.offer(features),
            wire.offer(models),
        )
        return wire.claim(reply)

    def renew(self, worker_id: str, beats: Sequence[Beat]) -> dict[str, Renewal]:
        """Renew the leases of all jobs of a worker in one call, and publish the progress that changed.

        A lease that ran out but was not reaped yet is renewed too: the job is still its holder's.
        """
        if not beats:
            return {}
        args = [
            value for beat in beats for value in (beat.job_id, beat.token, beat.stage, beat.step, beat.of)
        ]
        verdicts: list[Renewal] = self._run("renew", worker_id, self._settings.lease_s, *args)
        return {beat.job_id: verdict for beat, verdict in zip(beats, verdicts, strict=True)}

    def finish(self, job_id: str, token: int, outcome: Outcome) -> Finished:
        """Commit how an attempt ended. Only the current token's outcome is accepted.

        Of a cancelling job, a `Done` is kept; a `Failed` ends it as `cancelled`. A `Done` with a `name` is
        committed, but the job is not shown as done before its picture has that name: where the answer is
        `naming`, store it and call again without the name.
        """
        state, keep_s, result, error = self._outcome(outcome)
        name = outcome.name if isinstance(outcome, Done) else None
        keep_name_s = max(self._settings.keep_done_s, self._settings.keep_failed_s)
        accepted, now, due, *naming = self._run(
            "finish", job_id, token, state, keep_s, self._settings.window, result, error, name, keep_name_s
        )
        return Finished(
            bool(int(accepted)), JobState(now) if now else None, wire.wakeups(due), naming=bool(naming)
        )

    def named(self, owner: str, name: str) -> str | None:
        """The job whose picture has a name: of those committed under it the one that was submitted last."""
        with typed_errors(self._where):
            _, _, job_id = str(self._client.get(f"op:name:{owner} {name}") or "").partition(" ")
        return job_id or None

    def _outcome(
        self, outcome: Outcome
    ) -> tuple[JobState, int, Mapping[str, Any] | None, Mapping[str, Any] | None]:
        if isinstance(outcome, Done):
            return JobState.DONE, self._settings.keep_done_s, dict(outcome.result), None
        if isinstance(outcome, Failed):
            return JobState.FAILED, self._settings.keep_failed_s, None, dict(outcome.error)
        return JobState.CANCELLED, self._settings.keep_failed_s, None, None

    def release(
        self, job_id: str, token: int, reason: ReleaseReason, detail: str = "", said: str = ""
    ) -> Released:
        """Give a job back. `detail` says what happened, for people ("engine killed by signal 11"); `said` are
        the last lines that the engine wrote.

        A stale token changes nothing. A cancelling job becomes `cancelled`; a crash beyond `max_crashes`
        makes the job `dead`.
        """
        settings = self._settings
        return self._released(
            self._run(
                "release",
                job_id,
                token,
                reason,
                detail,
                settings.window,
                settings.max_crashes,
                settings.keep_failed_s,
                said,
                min(MEMORY_REST_S, settings.unable_after_s),
            )
        )

    def _released(self, reply: Sequence[Any]) -> Released:
        state, due = reply
        return Released(JobState(state) if state else None, wire.wakeups(due))

    def reap(self) -> Reaped:
        """Mend what died: expired leases, lost messages, jobs nobody can render, expired records.

        Does nothing for one lease after Redis was away, so that owners renew first. Bounded work per call;
        call it every `reap_s` from every worker.
        """
        with typed_errors(self._where):
            return self._reaper.reap(time.monotonic())

    # Queries ------------------------------------------------------------

    def job(self, job_id: str) -> JobRecord | None:
        """One record with its spec."""
        with typed_errors(self._where):
            return listing.job(self._client, job_id)

    def group(self, owner: str, group: str) -> list[str]:
        """The ids of an owner's jobs of a group, oldest first."""
        with typed_errors(self._where):
            return listing.group(self._client, owner, group)

    def history(self, job_id: str) -> History:
        """How the last attempts at a job ended that did not finish it, and what its engine said last."""
        with typed_errors(self._where):
            return history.history(self._client, job_id)

    def records(self, job_ids: Iterable[str], *, specs: bool = False) -> dict[str, JobRecord]:
        """Those of these records that are there, by id; a round trip for hundreds."""
        with typed_errors(self._where):
            return {
                record.id: record
                for chunk in wire.chunks(job_ids, _PIPELINE)
                for record in listing.records(self._client, chunk, specs=specs)
            }

    def jobs(
        self,
        owner: str | None = None,
        state: JobState | Collection[JobState] | None = None,
        *,
        group: str | None = None,
        model: str | None = None,
        limit: int = 100,
        labels: Mapping[str, str] | None = None,
    ) -> list[JobRecord]:
        """At most `limit` records without their specs, newest first. `group` needs `owner`."""
        wanted = listing.Filter(owner, listing.states(state), group, model, labels or {})
        with typed_errors(self._where):
            return listing.jobs(self._client, wanted, limit)

    def counts(self) -> dict[JobState, int]:
        """How many records are in each state."""
        with typed_errors(self._where):
            return listing.counts(self._client)

    def depth(self, model: str | None = None) -> int:
        """How many jobs are queued, for one model or for all."""
        with typed_errors(self._where):
            return listing.depth(self._client, model)

    def oldest_waiting(self, model: str) -> float | None:
        """For how many seconds the oldest queued job of `model` has waited; None: nothing waits."""
        with typed_errors(self._where):
            return listing.oldest_waiting(self._client, model)

    def census(self) -> list[Count]:
        """How many jobs there are of each state, model and method."""
        with typed_errors(self._where):
            return census.now(self._client)

    def moves(self) -> list[Count]:
        """How many jobs ever came into each state, by model and method. These only grow."""
        with typed_errors(self._where):
            return census.ever(self._client)

    def queues(self, served: Collection[str] = ()) -> list[QueueState]:
        """The queues of the models that are `served`, or have jobs that wait or run, by name."""
        with typed_errors(self._where):
            return census.queues(self._client, served)

    def place(self, record: JobRecord) -> Place | None:
        """Where a queued job stands among those of its model; None if it does not wait."""
        with typed_errors(self._where):
            return census.place(self._client, record)

    def quarantined(self) -> int:
        """How many items of the queues were no messages (the newest hundred are kept)."""
        with typed_errors(self._where):
            return census.quarantined(self._client)

    def input_collector(self) -> inputs.InputCollector:
        """What a collector of garbage asks before it deletes an input."""
        return inputs.InputCollector(self._client, self._scripts, self._where)

    def quota(self, owner: str) -> quotas.Quota:
        """What an owner may have waiting and submit, and what is used of it."""
        with typed_errors(self._where):
            return quotas.quota(self._client, owner)

    def set_limits(self, owner: str | None, limits: Mapping[str, int | None]) -> None:
        """Set limits of an owner (None: for all), by the names of `Quota`; 0: none, None: take it back."""
        with typed_errors(self._where):
            quotas.set_limits(self._client, owner, limits)

    def audit(
        self,
        *,
        since: float | None = None,
        owner: str | None = None,
        action: str | None = None,
        limit: int = 100,
    ) -> audit.Trail:
        """The newest `limit` lines of the audit trail, since a time of Redis, about an owner's jobs.

        Raises LedgerUnreachable for a Redis user that may not read it: workers and the operator may.
        """
        wanted = audit.AuditFilter(since=since, owner=owner, action=action)
        with typed_errors(self._where):
            return audit.trail(self._client, self._where, wanted, limit)

    def events(self, owner: str, ids: Collection[str] | None = None) -> Events:
        """The live events of an owner's jobs, or of some: `with ledger.events("me") as events: ...`."""
        return Events(self._client, self._where, owner, ids)

    # Worker records ------------------------------------------------------------

    def announce(self, worker: WorkerRecord, ttl: float | None = None) -> None:
        """Make a worker known for `ttl` seconds (default: `worker_ttl_s`)."""
        self._run("announce", worker.id, worker.name, worker.to_json(), ttl or self._settings.worker_ttl_s)

    def retire(self, worker_id: str) -> None:
        """Forget a worker that leaves."""
        with typed_errors(self._where):
            roster.retire(self._client, worker_id)

    def workers(self) -> list[WorkerRecord]:
        """The live workers, by name."""
        with typed_errors(self._where):
            return roster.workers(self._client)[0]

    def catalogue(self) -> "Catalogue":
        """What the live workers offer together."""
        from overpaint_shared.catalogue import Catalogue  # pydantic models: a worker need not wait for them

        return Catalogue.merge(self.workers())

    def _run(self, script: str, *args: object) -> Any:
        with typed_errors(self._where):
            return self._scripts.run(script, *args)
