"""From a draft to a queued job: parse, check, upload the pictures, draw the seed, record, wake a worker."""

import base64
import logging
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overpaint_producer.jobfiles import Draft, as_object, read_path
from overpaint_producer.pictures import Seen, Uploader, check_costs, check_sizes
from overpaint_shared.catalogue import Catalogue, SpecWarning, check
from overpaint_shared.errors import InputError, Problem, ServiceError, SpecError, shorten
from overpaint_shared.job import JobSpec, parse_job
from overpaint_shared.ledger import (
    InputsGone,
    Ledger,
    QuotaExceeded,
    Submission,
    SubmitConflict,
    Submitted,
    Wakeup,
    spec_digest,
)
from overpaint_shared.lint import lint
from overpaint_shared.spec.fields import LONGEST_LINE, is_line

if TYPE_CHECKING:
    from celery import Celery

    from overpaint_shared.setting_views import Limits
    from overpaint_shared.store import Store

CHUNK = 250
"""Jobs that are recorded and published together."""
LOOK_AGAIN_S = (0.02, 0.1, 0.3, 1.0, 3.0, 5.0)
"""Waits before looking again for pictures that `overpaint gc` may just delete, which takes milliseconds."""
QUOTA_PATIENCE_S = 60.0
"""How long a submit waits for the owner's rate to allow another job."""
SHORTEST_WAIT_S = 0.5
SEED_BITS = 32
"""Of a seed only the low 32 bits choose the noise, so more would only make two names for one picture."""

# A library's messages belong to the program that uses it; unconfigured, warnings go to standard error.
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a submit sets in every job, over what the job itself says. None leaves the job's own."""

    group: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int | None = None
    token: str | None = None
    """Makes submitting again give the jobs that are there: `token` for one job, `token-1`, `token-2` ... for
    many.
    """

    def applied(self, draft: Draft) -> Draft:
        """The draft with these values in it."""
        changes: dict[str, Any] = {}
        if self.group is not None:
            changes["group"] = self.group
        if self.priority is not None:
            changes["priority"] = self.priority
        if self.labels:
            changes["labels"] = {**_labels(draft), **self.labels}
        return replace(draft, data=as_object(draft) | changes) if changes else draft


def _labels(draft: Draft) -> dict[str, Any]:
    labels = as_object(draft).get("labels")
    return labels if isinstance(labels, dict) else {}  # anything else is the spec's to refuse


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A job that is checked and whose pictures are on their way."""

    submission: Submission
    warnings: tuple[SpecWarning, ...]


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job that the ledger has."""

    draft: Draft
    answer: Submitted
    warnings: tuple[SpecWarning, ...]


class Submitter:
    """Queues jobs for one owner. Use one for each run of submits: it remembers the files it has sent."""

    def __init__(
        self, *, ledger: Ledger, store: "Store", app: "Celery", limits: "Limits", owner: str
    ) -> None:
        self._ledger = ledger
        self._app = app
        self._limits = limits
        self._owner = owner
        self._slowed = False
        self._uploader = Uploader(store, limits, owner)

    def submit(self, drafts: Iterable[Draft], options: Options, *, many: bool) -> Iterator[Queued]:
        """Queue jobs in chunks; each told in order, as soon as its chunk is recorded.

        `many` says that tokens are numbered. An error ends it; the chunks before it stay submitted.
        """
        _check_token(options.token)
        numbered = enumerate(drafts, start=1)
        while chunk := list(islice(numbered, CHUNK)):
            yield from self._submit_chunk(
                [
                    (options.applied(draft), _token(options.token, number, many=many))
                    for number, draft in chunk
                ]
            )

    def _submit_chunk(self, chunk: Sequence[tuple[Draft, str | None]]) -> Iterator[Queued]:
        queued: dict[int, Queued] = {}
        waits = iter(LOOK_AGAIN_S)
        while todo := [at for at in range(len(chunk)) if at not in queued]:
            ready = self._prepare([chunk[at] for at in todo])
            try:
                answers: Sequence[Submitted] = self._record([each.submission for each in ready])
                gone: Collection[str] = ()
            except InputsGone as error:  # the others are recorded
                if (wait_s := next(waits, None)) is None:
                    raise
                answers, gone = error.submitted, error.gone
                self._uploader.doubt({sha256 for each in error.gone.values() for sha256 in each})
                time.sleep(wait_s)
            kept = [
                (at, each) for at, each in zip(todo, ready, strict=True) if each.submission.id not in gone
            ]
            for (at, each), answer in zip(kept, answers, strict=True):
                queued[at] = Queued(draft=chunk[at][0], answer=answer, warnings=each.warnings)
        yield from (queued[at] for at in range(len(chunk)))

    def _prepare(self, drafts: Sequence[tuple[Draft, str | None]]) -> list[Ready]:
        """Check the jobs, and store their pictures."""
        catalogue = self._ledger.catalogue()
        self._uploader.begin(self._ledger.now())
        with self._uploader:
            return [self._ready(draft, token, catalogue) for draft, token in drafts]

    def _ready(self, draft: Draft, token: str | None, catalogue: Catalogue) -> Ready:
        spec = parse_job(draft.data, where=draft.where)
        warnings = check(spec, catalogue, self._limits, where=draft.where)
        references: dict[str, str] = {}
        for path, reference in spec.image_refs():
            references.setdefault(reference, path)
        try:
            seen = self._uploader.look(references, draft.folder)
        except InputError as error:  # of many files, which one names the picture
            raise InputError(
                f"{draft.where}: {error.message}", field=error.field, value=error.value, fix=error.fix
            ) from error
        check_sizes(spec, {name: each.size for name, each in seen.items() if each.size}, draft.where)
        check_costs(spec, seen, self._limits)
        self._uploader.send(seen.values())
        source = seen[next(iter(references))]  # the first reference is the source's
        warnings += lint(spec, defaults=catalogue.defaults(spec.model), source_size=source.size)
        spec = spec.with_images({name: each.reference for name, each in seen.items()})
        checked = self._uploader.checked(each.reference for each in seen.values())
        submission = self._submission(spec, token, catalogue, source, checked)
        return Ready(submission=submission, warnings=warnings)

    def _submission(
        self, spec: JobSpec, token: str | None, catalogue: Catalogue, source: Seen, checked: float
    ) -> Submission:
        digest = spec_digest(spec.to_json())  # before the seed is drawn: the same job again is the same job
        if spec.sampling.seed is None:
            spec = spec.with_seed(secrets.randbits(SEED_BITS))
        return Submission(
            id=new_job_id(),
            owner=self._owner,
            spec_json=spec.to_json(),
            model=spec.model,
            priority=spec.priority,
            group=spec.group,
            labels=dict(spec.labels),
            token=token,
            title=title(spec, source.size),
            features=needed(spec, catalogue),
            digest=digest,
            deadline_s=spec.deadline_s,
            checked=checked,
        )

    def _record(self, ready: Sequence[Submission]) -> list[Submitted]:
        """Record jobs, and wait where the owner submits faster than is allowed, as long as some get on."""
        answers: dict[str, Submitted] = {}
        todo, end = list(ready), time.monotonic() + QUOTA_PATIENCE_S
        while True:
            refused: Collection[str] = ()
            try:
                done: Sequence[Submitted] = self._ledger.submit(todo)
            except (SubmitConflict, InputsGone) as error:  # the others of this chunk are recorded
                wake(self._app, [wakeup for each in error.submitted for wakeup in each.wakeups])
                if isinstance(error, InputsGone):
                    _keep(answers, todo, error.gone, error.submitted)
                    error.submitted = tuple(answers[each.id] for each in ready if each.id in answers)
                raise
            except QuotaExceeded as error:
                wake(self._app, [wakeup for each in error.submitted for wakeup in each.wakeups])
                if error.submitted:
                    end = time.monotonic() + QUOTA_PATIENCE_S
                if not error.wait_s or time.monotonic() + error.wait_s > end:
                    raise
                _keep(answers, todo, error.refused, error.submitted)
                refused = error.refused
                self._slow_down(error)
            else:
                wake(self._app, [wakeup for each in done for wakeup in each.wakeups])
                _keep(answers, todo, (), done)
            todo = [each for each in todo if each.id in refused]
            if not todo:
                return [answers[each.id] for each in ready]

    def _slow_down(self, error: QuotaExceeded) -> None:
        if not self._slowed:
            log.warning("submitting more slowly: %s", error.message, extra={"action": "submit.slowed"})
        self._slowed = True
        time.sleep(max(error.wait_s, SHORTEST_WAIT_S))


def _keep(
    answers: dict[str, Submitted],
    asked: Sequence[Submission],
    without: Collection[str],
    done: Sequence[Submitted],
) -> None:
    """Note the answers of those that were asked, `without` left out, by the ids that they were asked with."""
    ids = [each.id for each in asked if each.id not in without]
    answers |= zip(ids, done, strict=True)


def wake(app: "Celery", wakeups: Sequence[Wakeup]) -> None:
    """Send the messages that the ledger asked for.

    A failure is only logged: the jobs are recorded, and a worker's reaper sends what is missing within
    seconds.
    """
    from overpaint_shared.queues import publish

    if not wakeups:
        return
    try:
        publish(app, wakeups)
    except ServiceError as error:
        log.warning(
            "messages not sent, a worker will send them: %s", error, extra={"action": "submit.publish_failed"}
        )


def needed(spec: JobSpec, catalogue: Catalogue) -> frozenset[str]:
    """What a worker must be able to do, the model's default sampler included where a worker says what that
    is.
    """
    defaults = catalogue.defaults(spec.model)
    return (spec.resolved(defaults) if defaults else spec).features()


def title(spec: JobSpec, size: tuple[int, int] | None) -> str:
    """What people read in Flower and on bars: model, method, size of the source, denoise, seed."""
    pixels = [f"{size[0]}x{size[1]}"] if size else []
    strength = [f"denoise {spec.denoise:g}", f"seed {spec.sampling.seed}"]
    return " ".join([spec.model, spec.method.kind, *pixels, *strength])


def new_job_id() -> str:
    """A random name of 16 letters and digits (80 bits), easy to select and to type."""
    return base64.b32encode(secrets.token_bytes(10)).decode().lower()


def _token(token: str | None, number: int, *, many: bool) -> str | None:
    return f"{token}-{number}" if token is not None and many else token


def _check_token(token: str | None) -> None:
    if token is not None and not is_line(token):
        allowed = f"one line of 1 to {LONGEST_LINE} characters, without control characters"
        given = shorten(token, 80)
        problem = Problem(path="token", message="cannot be a token", given=given, allowed=allowed)
        raise SpecError("the token is wrong:", [problem])


def draft_of(spec: "JobSpec | Mapping[str, Any] | str | Path", folder: Path | None) -> Iterator[Draft]:
    """The drafts of what a caller of the library has: a spec, its JSON as an object, or a file (`.jsonl`:
    many).

    `folder` is where picture paths start from; None: a file's own folder, else the working directory.
    """
    if isinstance(spec, str | Path):
        for draft in read_path(Path(spec)):
            yield draft if folder is None else replace(draft, folder=folder)
        return
    data = spec.to_json().encode() if isinstance(spec, JobSpec) else dict(spec)
    yield Draft(data=data, folder=folder or Path.cwd(), where="job")
