"""From a draft to a queued job: parse, check, upload the pictures, draw the seed, record, wake a worker."""

import base64
import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overpaint_producer.jobfiles import Draft, as_object, read_path
from overpaint_producer.pictures import Seen, Uploader, check_costs, check_sizes
from overpaint_shared.catalogue import Catalogue, SpecWarning, check
from overpaint_shared.errors import InputError, OverpaintError, Problem, ServiceError, SpecError, shorten
from overpaint_shared.job import JobSpec, parse_job
from overpaint_shared.ledger import (
    InputsGone,
    Ledger,
    PartlySubmitted,
    QuotaExceeded,
    Submission,
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
LONGEST_LOOK_S = 10.0
LOOK_AGAIN_S = (0.02, 0.1, 0.3, 1.0, 3.0, 5.0, *(LONGEST_LOOK_S,) * 12)
"""Waits before looking again for pictures that `overpaint gc` may just delete. That takes milliseconds.
After a collector that was killed, the picture can be used again only when `CONDEMNED_S` are over.
"""
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

        `many` says that tokens are numbered. An error ends it, after all jobs that were submitted are told;
        its `submitted` names them where it is a `PartlySubmitted`.
        """
        _check_token(options.token)
        numbered = enumerate(drafts, start=1)
        done: list[Submitted] = []
        while chunk := list(islice(numbered, CHUNK)):
            applied = [
                (options.applied(draft), _token(options.token, number, many=many)) for number, draft in chunk
            ]
            try:
                for queued in self._submit_chunk(applied):
                    done.append(queued.answer)
                    yield queued
            except PartlySubmitted as error:
                error.submitted = tuple(done)
                if many:
                    _tell_how_many(error, len(done), options.token)
                raise

    def _submit_chunk(self, chunk: Sequence[tuple[Draft, str | None]]) -> Iterator[Queued]:
        """The jobs of a chunk. Those that were submitted before an error are told before it is raised."""
        queued: dict[int, Queued] = {}
        failed: BaseException | None = None
        try:
            self._queue(chunk, queued)
        except (OverpaintError, KeyboardInterrupt) as error:
            failed = error
        yield from (queued[at] for at in sorted(queued))
        if failed is not None:
            raise failed

    def _queue(self, chunk: Sequence[tuple[Draft, str | None]], queued: dict[int, Queued]) -> None:
        """Submit a chunk, and note in `queued` which of its jobs the ledger has, by their place."""
        waits = iter(LOOK_AGAIN_S)
        while todo := [at for at in range(len(chunk)) if at not in queued]:
            ready = self._prepare([chunk[at] for at in todo])
            answers: dict[str, Submitted] = {}
            gone: InputsGone | None = None
            try:
                self._record([each.submission for each in ready], answers)
            except InputsGone as error:
                gone = error
            finally:
                for at, each in zip(todo, ready, strict=True):
                    if answer := answers.get(each.submission.id):
                        queued[at] = Queued(draft=chunk[at][0], answer=answer, warnings=each.warnings)
            if gone is not None:
                self._look_again(gone, waits)

    def _look_again(self, gone: InputsGone, waits: Iterator[float]) -> None:
        """Wait before the pictures that may be gone are looked for again. Raise when all waits are over."""
        if (wait_s := next(waits, None)) is None:
            raise gone
        if wait_s == LONGEST_LOOK_S:
            log.warning("waiting: %s", gone.message, extra={"action": "submit.waits"})
        self._uploader.doubt({sha256 for each in gone.gone.values() for sha256 in each})
        time.sleep(wait_s)

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

    def _record(self, ready: Sequence[Submission], answers: dict[str, Submitted]) -> None:
        """Record jobs, and note the answers by the ids that they were submitted with.

        Waits where the owner submits faster than is allowed, as long as some get on.
        """
        todo, end = list(ready), time.monotonic() + QUOTA_PATIENCE_S
        while True:
            refused: PartlySubmitted | None = None
            try:
                done: Sequence[Submitted] = self._ledger.submit(todo)
            except PartlySubmitted as error:
                done, refused = error.submitted, error
            left = refused.refused if refused else frozenset()
            answers |= zip((each.id for each in todo if each.id not in left), done, strict=True)
            wake(self._app, [wakeup for each in done for wakeup in each.wakeups])
            if refused is None:
                return
            if done:
                end = time.monotonic() + QUOTA_PATIENCE_S
            if not isinstance(refused, QuotaExceeded) or not refused.wait_s:
                raise refused
            if time.monotonic() + refused.wait_s > end:
                raise refused
            self._slow_down(refused)
            todo = [each for each in todo if each.id in left]

    def _slow_down(self, error: QuotaExceeded) -> None:
        if not self._slowed:
            log.warning("submitting more slowly: %s", error.message, extra={"action": "submit.slowed"})
        self._slowed = True
        time.sleep(max(error.wait_s, SHORTEST_WAIT_S))


def _tell_how_many(error: PartlySubmitted, count: int, token: str | None) -> None:
    """Say in an error that some jobs were submitted, so that nobody submits them twice."""
    if not count:
        return
    error.message += f"; {count} jobs were submitted, the rest was not"
    if token is None:
        error.fix = f"{error.fix}; submit only the rest again: without a token the others would run twice"


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
