"""The Celery task: one attempt at one job, from its claim to the ledger's word that it counts.

The ledger decides, Celery only wakes: the message is acknowledged when the attempt has ended (`acks_late`),
but nothing depends on it. A message for which there is nothing to do ends with `Ignore`, so that Flower keeps
the real run's state.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from traceback import format_exc
from typing import Any, Protocol, TypeVar

import structlog
from celery import Celery
from celery.exceptions import Ignore, Reject
from celery.worker.request import Request
from structlog.contextvars import bound_contextvars

from overpaint_shared.errors import (
    DeadlineError,
    EngineError,
    JobError,
    OutOfMemory,
    OverpaintError,
    ServiceError,
    SpecError,
    StoreError,
    UnsupportedError,
)
from overpaint_shared.job import JobSpec, Output, parse_job
from overpaint_shared.ledger import (
    Cancelled,
    Claim,
    Done,
    Failed,
    Finished,
    JobState,
    Ledger,
    Outcome,
    ReleaseReason,
    Wakeup,
)
from overpaint_shared.queues import RENDER_TASK
from overpaint_shared.settings import Limits
from overpaint_shared.store_errors import is_final
from overpaint_shared.store_keys import named_key
from overpaint_worker import protocol
from overpaint_worker.crashes import Blame
from overpaint_worker.cycle import Intake
from overpaint_worker.engine_client import Answer, EngineClient, Gone
from overpaint_worker.engine_output import readable
from overpaint_worker.inputs import Inputs
from overpaint_worker.keeper import Attempt, Keeper
from overpaint_worker.metrics import COMMIT, Metrics
from overpaint_worker.naming import PICTURE, Named, content_type
from overpaint_worker.patience import Patience, Stopped, check, patiently
from overpaint_worker.storage import ObjectFails, Storage

FETCH, STORE = "fetch", "store"

_BLAMED: Mapping[Blame, ReleaseReason] = {
    Blame.GUILTY: ReleaseReason.CRASHED,
    Blame.SUSPECT: ReleaseReason.SUSPECTED,
    Blame.BESIDE: ReleaseReason.STOPPED,
}

T = TypeVar("T")
log = structlog.get_logger(__name__)


class JobFailed(Exception):
    """Shown by Flower as the task's failure; the ledger has the whole error."""


@dataclass(frozen=True)
class GiveBack:
    """The job returns to its queue."""

    reason: ReleaseReason
    why: str
    said: str = ""
    """The last lines of what failed."""


@dataclass
class Timing:
    """Where an attempt's time went, in seconds, for its result's summary."""

    spent: dict[str, float] = field(default_factory=dict)
    _at: float = field(default_factory=time.perf_counter)

    def mark(self, name: str) -> None:
        """What ended just now."""
        now = time.perf_counter()
        self.spent[name] = round(now - self._at, 6)
        self._at = now


class Room(Protocol):
    """What an attempt needs of its worker."""

    worker_id: str
    name: str
    ledger: Ledger
    storage: Storage
    limits: Limits
    engine: EngineClient
    keeper: Keeper
    intake: Intake
    patience: Patience
    metrics: Metrics

    def publish(self, wakeups: Sequence[Wakeup]) -> None:
        """Send the messages that a ledger call asked for."""

    def claim(self, job_id: str) -> Claim:
        """Claim a job for this worker."""

    def slot_freed(self) -> None:
        """A message has ended."""


def register(app: Celery, room: Room) -> None:
    """Make the render task known to a worker's app."""

    class WakingRequest(Request):
        """Lets Celery's loop look for the next message as soon as a slot is free."""

        def on_success(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().on_success(*args, **kwargs)  # failures come here too, with a pool of threads
            finally:
                room.slot_freed()

    @app.task(
        name=RENDER_TASK,
        bind=True,
        shared=False,
        acks_late=True,
        ignore_result=True,
        throws=(JobFailed,),
        Request=WakingRequest,
    )
    def render(self: Any, job_id: str) -> None:
        if room.intake.closed:  # taken just before the worker closed
            raise Reject(requeue=True)
        ended = Renderer(room).run(job_id)
        if isinstance(ended, Cancelled):
            self.send_event("task-revoked", terminated=True, signum=None, expired=False)
        if isinstance(ended, Failed):
            raise JobFailed(str(OverpaintError.from_json(ended.error)))
        if not isinstance(ended, Done):
            raise Ignore


class Renderer:
    """One attempt at one job."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._timing = Timing()
        self._began = time.perf_counter()
        self._kind = ("", "")
        self._alone = False
        self._picture: Named | None = None

    def run(self, job_id: str) -> Outcome | None:
        """Claim, render and settle a job; how it ended, None if it did not end here."""
        try:
            claim = self._room.claim(job_id)
        except ServiceError as error:  # the reaper sends another message
            log.warning("claim failed", action="job.claim_failed", job=job_id, error=str(error))
            return None
        self._room.publish(claim.wakeups)
        if claim.verdict != "ok":
            log.info("message without work", action="job.noop", job=job_id, verdict=claim.verdict)
            return None
        self._timing.mark("claim_s")
        self._room.metrics.claimed(claim.waited_s)
        with (
            bound_contextvars(job=job_id, token=claim.token, attempt=claim.attempt),
            self._room.keeper.watching(job_id, claim.token, claim.attempt) as a,
        ):
            log.info("job claimed", action="job.claimed", alone=claim.alone)
            return self._settle(a, self._attempt(claim, a))

    # From a claim to an end

    def _attempt(self, claim: Claim, attempt: Attempt) -> Outcome | GiveBack:
        if self._room.keeper.closed:  # the claim was under way when all others were given back
            return GiveBack(ReleaseReason.STOPPED, "its worker stopped")
        try:
            spec = parse_job(claim.spec_json)
            self._kind = (spec.model, spec.method.kind)
            pictures = self._fetch(claim.owner, spec, attempt)
            self._timing.mark("fetch_s")
            answer = self._rendered(claim, pictures, attempt)
            self._timing.mark("engine_s")
            return self._outcome(answer, attempt, claim.owner, spec.output)
        except Stopped:
            return Cancelled()
        except (UnsupportedError, SpecError) as error:  # a newer spec than this worker knows
            return GiveBack(ReleaseReason.UNABLE, str(error))
        except (JobError, EngineError) as error:  # EngineError: larger than the protocol carries
            return Failed(error.to_json())
        except ServiceError as error:
            if is_final(error):
                return Failed(error.to_json())
            return GiveBack(ReleaseReason.STOPPED, str(error))
        except ObjectFails as error:
            return GiveBack(ReleaseReason.FAULT, str(error))
        except Exception as error:
            log.exception("unexpected error", action="job.unexpected")
            return GiveBack(
                ReleaseReason.FAULT, f"{type(error).__name__}: {error}", readable(format_exc().encode())
            )

    def _fetch(self, owner: str, spec: JobSpec, attempt: Attempt) -> dict[str, bytes]:
        room = self._room
        inputs = Inputs(
            store=room.storage.store,
            owner=owner,
            max_bytes=room.limits.max_input_bytes,
            max_job_bytes=room.limits.max_job_bytes,
            again=lambda call: room.storage.patiently(
                call, room.patience.fetch_s, attempt, FETCH, object_s=room.patience.fetch_s
            ),
        )
        return inputs.fetch(spec)

    def _rendered(self, claim: Claim, pictures: Mapping[str, bytes], attempt: Attempt) -> Answer:
        check(attempt)
        room, self._alone = self._room, claim.alone
        future = room.engine.render(
            protocol.Render(
                job=attempt.job,
                token=attempt.token,
                spec_json=claim.spec_json,
                inputs=pictures,
                alone=claim.alone,
            )
        )
        if attempt.cancelled or attempt.fenced:  # said before the engine knew the job
            room.engine.cancel(attempt.job, attempt.token)
        return future.result()

    def _outcome(self, answer: Answer, attempt: Attempt, owner: str, output: Output) -> Outcome | GiveBack:
        match answer:
            case protocol.Done():
                return self._stored(answer, attempt, owner, output)
            case protocol.Cancelled():
                return Cancelled()
            case Gone():
                return GiveBack(_BLAMED[answer.blame], str(answer.error), answer.said)
            case protocol.Failed():
                return _refusal(answer, self._room.engine.last_words, alone=self._alone)

    def _stored(self, done: protocol.Done, attempt: Attempt, owner: str, output: Output) -> Done:
        check(attempt)
        room = self._room
        room.keeper.progress(attempt.job, attempt.token, STORE)
        attempt.wrote = True
        with room.storage.holding(sum(map(len, done.files.values()))):
            writes = {name: partial(self._put, attempt, name, data) for name, data in done.files.items()}
            files = room.storage.all(writes, room.patience.store_s, attempt, STORE)
        self._timing.mark("store_s")
        result = {"files": files, "summary": done.summary | {"worker": self._summary()}}
        if output.key is None:
            return Done(result=result)
        name = f"{PICTURE}{output.format}"
        self._picture = Named(attempt.job, owner, output.key, content_type(name), done.files[name])
        return Done(result=result | {"key": named_key(owner, output.key)}, name=output.key)

    def _put(self, attempt: Attempt, name: str, data: bytes) -> str:
        return self._room.storage.store.put_result(attempt.job, attempt.token, name, data, content_type(name))

    def _named(self, attempt: Attempt, outcome: Outcome) -> tuple[Outcome, Finished]:
        """Give a committed picture its name, and finish. From here on the attempt's files are the job's."""
        attempt.wrote = False
        try:
            self._write_name(attempt)
        except StoreError as error:
            if not is_final(error):
                raise
            outcome = Failed(error.to_json())
        if isinstance(outcome, Done):
            outcome = replace(outcome, name=None)
        return outcome, self._finish(attempt, outcome)

    def _write_name(self, attempt: Attempt) -> None:
        room, picture = self._room, self._picture
        if picture is not None:
            room.storage.patiently(
                lambda: picture.write(room.storage.store, room.ledger),
                room.patience.store_s,
                attempt,
                STORE,
                stop_on_cancel=False,
                object_s=room.patience.fetch_s,  # after that a reaper goes on, and the slot is free
            )

    def _summary(self) -> dict[str, Any]:
        return {"name": self._room.name, "seconds": dict(self._timing.spent)}

    # Telling the ledger

    def _settle(self, attempt: Attempt, end: Outcome | GiveBack) -> Outcome | None:
        attempt.settling = True
        if attempt.fenced:
            self._ended("fenced")
            self._clean(attempt)
            return None
        if isinstance(end, GiveBack):
            self._give_back(attempt, end)
            return None
        return self._commit(attempt, end)

    def _give_back(self, attempt: Attempt, end: GiveBack) -> None:
        try:
            released = self._patiently(
                lambda: self._room.ledger.release(attempt.job, attempt.token, end.reason, end.why, end.said),
                self._room.patience.commit_s,
                attempt,
            )
        except (ServiceError, Stopped) as error:
            log.error("release failed", action="job.release_failed", error=str(error))  # noqa: TRY400
            self._ended("uncommitted")
            return
        self._room.publish(released.wakeups)
        self._room.metrics.released(end.reason)
        self._ended("released")
        log.warning(
            "job released",
            action="job.released",
            reason=end.reason.value,
            why=end.why,
            state=str(released.state),
        )
        self._clean(attempt)

    def _ended(self, outcome: str) -> None:
        self._room.metrics.ended(*self._kind, outcome, time.perf_counter() - self._began)

    def _commit(self, attempt: Attempt, outcome: Outcome) -> Outcome | None:
        """How the job ended for the ledger; None where that is not for this attempt to say."""
        try:
            finished = self._finish(attempt, outcome)
            if finished.naming:
                outcome, finished = self._named(attempt, outcome)
        except (ServiceError, ObjectFails, Stopped) as error:
            log.error("commit failed", action="job.commit_failed", error=str(error))  # noqa: TRY400
            self._ended("uncommitted")
            return None
        self._timing.mark("commit_s")
        self._room.metrics.stage(COMMIT, self._timing.spent["commit_s"])
        self._room.publish(finished.wakeups)
        if finished.state is JobState.CANCELLED:  # somebody cancelled it while it failed
            outcome = Cancelled()
        if finished.state is JobState.FAILED and isinstance(outcome, Cancelled):
            late = DeadlineError("the job did not end by its deadline", field="deadline_s")
            outcome = Failed(late.to_json())
        name = type(outcome).__name__.lower()
        self._ended(name if finished.accepted else "fenced")
        if finished.accepted:
            why = (
                {"error": str(OverpaintError.from_json(outcome.error))} if isinstance(outcome, Failed) else {}
            )
            log.info(f"job {name}", action=f"job.{name}", seconds=self._timing.spent, **why)
        else:
            log.warning("result not accepted", action="job.fenced", outcome=name)
        if not (finished.accepted and isinstance(outcome, Done)):
            self._clean(attempt)
        return outcome if finished.accepted else None

    def _finish(self, attempt: Attempt, outcome: Outcome) -> Finished:
        return self._patiently(
            lambda: self._room.ledger.finish(attempt.job, attempt.token, outcome),
            self._room.patience.commit_s,
            attempt,
            stop_on_cancel=False,
        )

    def _clean(self, attempt: Attempt) -> None:
        """Delete what this attempt wrote; nobody will ever show it. S3 may hang, so nobody waits for that."""
        if attempt.wrote:
            self._room.storage.later(("delete", attempt.job, attempt.token), partial(self._deleted, attempt))

    def _deleted(self, attempt: Attempt) -> None:
        try:
            self._room.storage.store.delete_attempt(attempt.job, attempt.token)
        except ServiceError as error:  # `overpaint gc` finds it
            log.info("leftovers stay", action="job.leftovers", error=str(error), **attempt.names())

    def _patiently(
        self, call: Callable[[], T], within_s: float, attempt: Attempt, *, stop_on_cancel: bool = True
    ) -> T:
        return patiently(call, within_s, attempt, self._room.metrics.retried, stop_on_cancel=stop_on_cancel)


def _refusal(failed: protocol.Failed, last_words: Callable[[], str], *, alone: bool) -> Outcome | GiveBack:
    """What becomes of a job that the engine could not render. `alone`: no other was in the engine."""
    error = OverpaintError.from_json(failed.error)
    if failed.kind == "job":
        return Failed(failed.error)
    if error.code == OutOfMemory.code:  # a larger device may do it, or this one later
        return GiveBack(ReleaseReason.NO_MEMORY, str(error))
    if failed.kind == "unable":
        return GiveBack(ReleaseReason.UNABLE, str(error))
    # A device that fails in a batch fails for all its jobs, so only a job alone is counted.
    reason = ReleaseReason.CRASHED if alone else ReleaseReason.SUSPECTED
    return GiveBack(reason, str(error), last_words())
