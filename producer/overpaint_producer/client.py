"""The library: a farm to submit jobs to, and jobs to wait for.

    with Farm.connect() as farm:
        job = farm.submit("job.json")
        for event in job.progress():
            print(event.stage, event.step, event.of)
        job.image().show()

The command line is made of these calls. All of them raise the typed errors of `overpaint_shared.errors`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from overpaint_producer.follow import follow
from overpaint_producer.job import Job
from overpaint_shared.job import JobSpec, parse_job
from overpaint_shared.ledger import Event, JobRecord, Ledger, QueueState, WorkerRecord
from overpaint_shared.ledger.states import JobState
from overpaint_shared.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

    from overpaint_producer.jobfiles import Draft
    from overpaint_producer.submitting import Options
    from overpaint_producer.why import Why
    from overpaint_shared.catalogue import Catalogue, SpecWarning
    from overpaint_shared.store import Store

__all__ = ["Farm", "Job", "SpecLike"]

SpecLike = JobSpec | Mapping[str, Any] | str | Path
"""A spec, its JSON as a dict, or the path of a job file. Pictures are looked for from the file's folder,
else here.
"""


class Farm:
    """A farm: its ledger, its store and its queues. Connects when first used; safe to share between
    threads.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger = Ledger.connect(settings.redis_url, settings.ledger(), acts_for=settings.owner)
        self.on_wait: Callable[[str], None] | None = None
        """Told in words while S3 does not answer; set it before the store is first used."""

    @classmethod
    def connect(cls, settings: Settings | None = None) -> "Farm":
        """The farm that the settings name; without them, that of the environment and the configuration file.

        Raises SettingsError, and LedgerUnreachable unless Redis answers.
        """
        farm = cls(settings or Settings.load())
        farm.ledger.ping()
        return farm

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to Redis."""
        self.ledger.close()
        if "app" in self.__dict__:
            self.app.close()

    @cached_property
    def store(self) -> "Store":
        """Where pictures are kept."""
        from overpaint_shared.store import Store  # boto3 takes a while to import; most commands never need it

        store = Store(self.settings.store())
        store.on_wait = self.on_wait
        return store

    @cached_property
    def app(self) -> "Celery":
        """The Celery app that messages are sent with."""
        from overpaint_shared.queues import make_app

        return make_app(self.settings.redis_url)

    # Submitting

    def submit(
        self,
        spec: SpecLike,
        *,
        token: str | None = None,
        group: str | None = None,
        labels: Mapping[str, str] | None = None,
        priority: int | None = None,
        folder: Path | None = None,
    ) -> "Job":
        """Queue one job, its pictures uploaded.

        `token` makes the call safe to repeat: the same job again gives the job that is there. `group`,
        `labels` and `priority` win over the spec's own; labels are added to it. `folder` is where picture
        paths start from; by default the file's folder, else the working directory.
        Raises SpecError, InputError (a picture is wrong), TokenConflict, and ServiceError.
        """
        return self._submit_all([spec], _options(token, group, labels, priority), folder, many=False)[0]

    def submit_many(
        self,
        specs: Iterable[SpecLike],
        *,
        token: str | None = None,
        group: str | None = None,
        labels: Mapping[str, str] | None = None,
        priority: int | None = None,
        folder: Path | None = None,
    ) -> list["Job"]:
        """Queue many jobs, recorded and published in batches; see `submit`. `token` becomes `token-1`,
        `token-2` ...

        An error ends it: what was submitted before stays submitted, so repeat the call with the same token.
        `submitted` of a `PartlySubmitted` error tells which jobs those are.
        """
        return self._submit_all(specs, _options(token, group, labels, priority), folder, many=True)

    def _submit_all(
        self, specs: Iterable[SpecLike], options: "Options", folder: Path | None, *, many: bool
    ) -> list["Job"]:
        from overpaint_producer.submitting import draft_of

        drafts = (draft for spec in specs for draft in draft_of(spec, folder))
        return [job for _, job in self.submit_drafts(drafts, options, many=many)]

    def submit_drafts(
        self, drafts: Iterable["Draft"], options: "Options", *, many: bool
    ) -> Iterator[tuple["Draft", "Job"]]:
        """Queue jobs that were read from files, yielding each as soon as its batch is recorded."""
        from overpaint_producer.submitting import Submitter

        settings = self.settings
        submitter = Submitter(
            ledger=self.ledger, store=self.store, app=self.app, limits=settings.limits(), owner=settings.owner
        )
        for queued in submitter.submit(drafts, options, many=many):
            answer = queued.answer
            yield queued.draft, Job(self, answer.id, created=answer.created, warnings=queued.warnings)

    # Looking

    def job(self, job_id: str) -> "Job":
        """The job with this id. Raises UnknownJob."""
        job = Job(self, job_id)
        job.status()
        return job

    def handle(self, job_id: str) -> "Job":
        """A job by its id, not looked for: its calls raise UnknownJob, and the audit trail has them."""
        return Job(self, job_id)

    def jobs(
        self,
        *,
        state: JobState | Collection[JobState] | None = None,
        group: str | None = None,
        model: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int = 100,
    ) -> list[JobRecord]:
        """The records of this owner, newest first, at most `limit`; None filters nothing."""
        return self.ledger.jobs(
            self.settings.owner, state=state, group=group, model=model, labels=labels, limit=limit
        )

    def group(self, name: str) -> list[str]:
        """The ids of this owner's jobs of a group, oldest first."""
        return self.ledger.group(self.settings.owner, name)

    def cancel(self, ids: Sequence[str]) -> dict[str, JobState]:
        """Ask many jobs to stop, those first that come last; see `Job.cancel`. What each is now, by id.

        An id without a record is left out.
        """
        from overpaint_producer.submitting import wake

        cancelled = self.ledger.cancel_all(tuple(reversed(ids)))
        wake(self.app, cancelled.wakeups)
        return {job_id: state for job_id in ids if (state := cancelled.states[job_id]) is not None}

    def workers(self) -> list[WorkerRecord]:
        """The live workers."""
        return self.ledger.workers()

    def queues(self) -> list[QueueState]:
        """The queues of all models that are served, or whose jobs wait or run."""
        return self.ledger.queues({model for worker in self.workers() for model in worker.serves})

    def why(self, job_id: str) -> "Why":
        """Why a job waits: its place, and what each live worker says to it. Raises UnknownJob."""
        from overpaint_producer.why import explain

        record, workers = self.job(job_id).status(), self.workers()
        queue = {queue.model: queue for queue in self.queues()}.get(record.model)
        running = self.ledger.records({job for worker in workers for job in worker.jobs})
        return explain(record, self.ledger.place(record), queue, workers, running, now=self.ledger.now())

    def catalogue(self) -> "Catalogue":
        """What the live workers can render together."""
        return self.ledger.catalogue()

    def check(self, spec: SpecLike) -> "tuple[JobSpec, tuple[SpecWarning, ...]]":
        """The spec and warnings, if it is right and this farm's workers and limits allow it; else
        SpecError. Of its pictures only the headers are read, of those that are files and there.
        """
        from overpaint_producer.headers import sizes_of
        from overpaint_producer.pictures import check_sizes
        from overpaint_producer.submitting import draft_of
        from overpaint_shared.catalogue import check
        from overpaint_shared.lint import lint

        draft, catalogue = next(draft_of(spec, None)), self.catalogue()
        parsed = parse_job(draft.data, where=draft.where)
        warnings = check(parsed, catalogue, self.settings.limits(), where=draft.where)
        sizes, defaults = sizes_of(parsed, draft.folder), catalogue.defaults(parsed.model)
        check_sizes(parsed, sizes, draft.where)
        source = sizes.get(parsed.source.image)
        return parsed, (*warnings, *lint(parsed, defaults=defaults, source_size=source))

    def follow(self, ids: Sequence[str], timeout: float | None = None) -> Iterator[Event]:
        """What happens to jobs, from their state now until all have ended.

        Raises TimeoutError after `timeout` seconds, UnknownJob, LedgerUnreachable when Redis is away for
        minutes.
        """
        return follow(self.ledger, self.settings.owner, ids, timeout_s=timeout)


def _options(
    token: str | None, group: str | None, labels: Mapping[str, str] | None, priority: int | None
) -> "Options":
    from overpaint_producer.submitting import Options

    return Options(token=token, group=group, labels=labels or {}, priority=priority)
