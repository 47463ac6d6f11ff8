"""What goes into the ledger and what comes out of it: frozen values, no behaviour.

Times are Unix seconds by the clock of Redis; `_s` are seconds.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final, Literal

from overpaint_shared.errors import InputError, LimitReached, OverpaintError, TokenConflict
from overpaint_shared.ledger.states import JobState
from overpaint_shared.ledger.tolerance import json_object

LONGEST_DEADLINE_S: Final = 2_592_000
JOB_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OWNER: Final = re.compile(r"[^\s\x00-\x1f]{1,128}")
_FEATURE: Final = re.compile(r"[^,\n]{1,128}")


def spec_digest(spec_json: str) -> str:
    """What stands for a spec where two are compared: 32 hexadecimal digits."""
    return blake2b(spec_json.encode(), digest_size=16).hexdigest()


def _require(pattern: re.Pattern[str], name: str, value: str) -> None:
    if not pattern.fullmatch(value):
        raise ValueError(f"{name} {value!r} must match {pattern.pattern}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job to be queued."""

    id: str
    """Chosen by the producer, unique: `[A-Za-z0-9_-]`, at most 64, none of them a dash at the beginning."""
    owner: str
    spec_json: str
    model: str
    priority: int = 5
    """0 (first) .. 9."""
    group: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    token: str | None = None
    """Makes the submission idempotent: scoped to the owner, valid while the record lives."""
    title: str = ""
    """What people read in Flower's table and in listings; short."""
    features: frozenset[str] = frozenset()
    """What a worker must be able to render (`JobSpec.features()`)."""
    digest: str | None = None
    """What `token` compares; absent: the digest of `spec_json`. Give `spec_digest` of the spec as the user
    wrote it where `spec_json` holds anything drawn at submit, such as a seed."""
    checked: float | None = None
    """A time of Redis (`Ledger.now`); all its stored inputs were seen or stored after it. None: not known."""

    deadline_s: float | None = None
    """The job fails if it has not ended so many seconds after it was submitted, or replayed."""

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not 0 < self.deadline_s <= LONGEST_DEADLINE_S:
            raise ValueError(f"deadline_s {self.deadline_s!r} must be above 0, at most {LONGEST_DEADLINE_S}")
        _require(JOB_ID, "job id", self.id)
        _require(_NAME, "model", self.model)
        _require(_OWNER, "owner", self.owner)
        for feature in self.features:
            _require(_FEATURE, "feature", feature)
        if not 0 <= self.priority <= 9:
            raise ValueError(f"priority {self.priority!r} must be 0..9")


@dataclass(frozen=True, slots=True)
class Wakeup:
    """A message that is due: `queues.publish` sends it. Losing or doubling one is harmless."""

    job_id: str
    model: str
    priority: int
    """The Celery priority of the job's class now: 0, 3, 6 or 9; 0 is first."""
    title: str
    stamp: float = 0.0
    """When the ledger asked for this message; travels in its header, so the reaper sees what was lost."""
    front: bool = False
    """Goes to the front of its list: the job had its turn already, or its message was lost."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """The answer to one submission."""

    id: str
    """The job that stands for it: another than submitted where the token was known."""
    created: bool
    """Whether this call made the record. False also when a lost connection made it call twice."""
    wakeups: tuple[Wakeup, ...]


class PartlySubmitted(OverpaintError):
    """Some of the submissions were not taken; the others were submitted."""

    code = "partly_submitted"
    submitted: tuple[Submitted, ...] = ()
    """The answers of those that were, in order; their wake-ups are due."""
    refused: frozenset[str] = frozenset()
    """The ids of those that were not."""


class QuotaExceeded(LimitReached, PartlySubmitted):
    """The owner has reached a limit."""

    code = "quota_exceeded"
    wait_s: float = 0.0
    """Seconds after which another submit is allowed; 0: when a job has left the queue."""


class SubmitConflict(TokenConflict, PartlySubmitted):
    """Some of the submissions have tokens (or ids) that stand for other specs."""

    code = "submit_conflict"


class InputsGone(InputError, PartlySubmitted):
    """Inputs of some submissions may have been deleted since they were seen."""

    code = "inputs_gone"
    gone: Mapping[str, frozenset[str]] = MappingProxyType({})
    """Id of a job -> SHA-256 of its inputs to look for. Others may be refused for another reason."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to a claim. Anything but `ok` means: do nothing with this message."""

    verdict: Literal["ok", "busy", "skip", "gone", "dead"]
    """ok: the job is yours · busy: somebody holds a lease (perhaps you) · skip: it has ended, or this worker
    cannot render it (another is woken) · gone: no record · dead: failed too often."""
    token: int = 0
    """The fencing token: every later call about this attempt shows it."""
    attempt: int = 0
    """Counts the claims since submit or replay, for people."""
    spec_json: str = ""
    owner: str = ""
    crashes: int = 0
    """How often its engine died or hung with this job at fault."""
    wakeups: tuple[Wakeup, ...] = ()
    waited_s: float | None = None
    """How long it was queued; None where a claim was asked for twice."""
    suspect: bool = False
    """An engine died while this job and others were at work, so it is not known which of them did it."""

    @property
    def alone(self) -> bool:
        """It must be rendered alone, so that the next crash has one culprit."""
        return self.suspect or self.crashes > 0


@dataclass(frozen=True, slots=True)
class Beat:
    """One running job in a renewal. Without a stage only the lease is renewed."""

    job_id: str
    token: int
    stage: str | None = None
    step: int = 0
    of: int = 0


Renewal = Literal["ok", "lost", "cancel"]
"""ok: go on · lost: the job is no longer yours, drop it · cancel: stop it, then `finish(Cancelled())`."""


@dataclass(frozen=True, slots=True)
class Done:
    """The job was rendered: file name -> storage key, and anything else for people, as JSON."""

    result: Mapping[str, Any]
    name: str | None = None
    """Its picture is to be stored under this name of its owner's before the job is done."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The job cannot be rendered: `OverpaintError.to_json()`."""

    error: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The step loop has stopped."""


Outcome = Done | Failed | Cancelled


class ReleaseReason(StrEnum):
    """Why a worker gives a job back."""

    STOPPED = "stopped"
    """The worker stops; not counted."""
    CRASHED = "crashed"
    """The engine died or hung through this job; counted, and beyond `max_crashes` the job is dead."""
    SUSPECTED = "suspected"
    """The engine died or hung while this job and others were at work; not counted, and it runs alone next."""
    FAULT = "fault"
    """The worker itself failed at this job, which is a defect, or could not read one of its pictures though
    S3 answers; counted, and beyond `max_crashes` the job is dead."""
    NO_MEMORY = "no_memory"
    """This worker has too little memory now; not counted. It is asked again later, three times in all."""
    UNABLE = "unable"
    """This worker cannot render it; not counted, and this worker is not asked again."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer to `finish`."""

    accepted: bool
    """False: the token is no longer the job's. Nothing of this attempt may show; delete what it stored."""
    state: JobState | None
    """The job's state now; None: no record."""
    wakeups: tuple[Wakeup, ...] = ()
    naming: bool = False
    """Committed, and not done yet: store the picture under its name, then finish without the name."""


@dataclass(frozen=True, slots=True)
class Released:
    """The answer to `release` and `cancel`."""

    state: JobState | None
    """The job's state now, whether this call moved it or not; None: no record."""
    wakeups: tuple[Wakeup, ...] = ()


@dataclass(frozen=True, slots=True)
class CancelledMany:
    """The answer to cancelling many jobs."""

    states: Mapping[str, JobState | None]
    """What each job is now; None: no record."""
    wakeups: tuple[Wakeup, ...] = ()


@dataclass(frozen=True, slots=True)
class Reaped:
    """What one call of the reaper did. Publish the wake-ups."""

    expired: tuple[str, ...] = ()
    """Jobs whose lease had run out: queued again, cancelled or dead."""
    unnamed: tuple[str, ...] = ()
    """Jobs that are committed and whose worker was lost before their picture had its name. Give it the name
    and finish them within a lease: nobody else is asked meanwhile."""
    stale: tuple[str, ...] = ()
    """Queued jobs whose message was lost."""
    unable: tuple[str, ...] = ()
    """Jobs that failed because no live worker can render them."""
    late: tuple[str, ...] = ()
    """Queued jobs that failed because their deadline passed."""
    mended: tuple[str, ...] = ()
    """Index entries that were missing, as `INDEX ID`."""
    odd: tuple[str, ...] = ()
    """What could not be used and was put into `op:quarantine`, in words."""
    wakeups: tuple[Wakeup, ...] = ()
    holding: bool = False
    """Redis was away, so this call did nothing: owners renew first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """A job as the ledger knows it."""

    id: str
    owner: str
    state: JobState
    model: str
    priority: int
    """As submitted, 0..9."""
    priority_class: int
    """As it waits now: 0, 3, 6 or 9."""
    title: str
    features: frozenset[str]
    group: str | None
    labels: Mapping[str, str]
    submit_token: str | None
    created: float
    since: float
    """When it was queued last, or moved up a class."""
    started: float | None
    ended: float | None
    attempt: int
    crashes: int
    lost_hosts: int
    token: int
    """The fencing token of the newest attempt, 0 before the first. Only its keys may be shown."""
    worker: str | None
    """Of the newest attempt."""
    worker_name: str | None
    lease: float | None
    stage: str | None
    step: int
    of: int
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    fault: str | None
    """What went wrong in the newest attempt that was given back, for people."""
    excluded: frozenset[str]
    """Workers that cannot render it."""
    deadline: float | None = None
    """When it fails unless it has ended."""
    naming: bool = False
    """Its result is committed and cannot be cancelled; it is done when its picture has its name."""
    spec_json: str | None = None
    """None in listings."""

    @property
    def files(self) -> dict[str, str]:
        """The storage keys of its files, by name; those of its result that can be used."""
        found = (self.result or {}).get("files")
        files = found.items() if isinstance(found, dict) else ()
        return {name: key for name, key in files if isinstance(key, str)}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for `--json`. A spec that cannot be read is null."""
        plain = asdict(self) | {
            "features": sorted(self.features),
            "excluded": sorted(self.excluded),
            "spec": json_object(self.spec_json),
        }
        del plain["spec_json"]
        return plain


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptEnd:
    """How one attempt at a job ended that did not finish it."""

    attempt: int
    token: int
    worker: str
    started: float | None
    ended: float | None
    how: str
    """crashed, lost, stopped, unable or failed."""
    detail: str
    """For people."""


@dataclass(frozen=True, slots=True)
class History:
    """What went wrong with a job until now."""

    attempts: tuple[AttemptEnd, ...] = ()
    """The last ones, oldest first, also from before a replay."""
    said: str = ""
    """The last lines that the engine wrote before it crashed with the job last."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"attempts": [asdict(each) for each in self.attempts], "said": self.said.splitlines()}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerRecord:
    """A live worker as it announces itself. JSON values only."""

    id: str
    """UUID of the process."""
    name: str
    """Celery's node name."""
    host: str
    device: str
    slots: int
    version: str
    features: frozenset[str] = frozenset()
    catalogue: tuple[Mapping[str, Any], ...] = ()
    """`ModelTraits` of everything in its registry, as JSON."""
    models: tuple[str, ...] = ()
    """The models whose queues it reads; empty: all in its catalogue."""
    running: int = 0
    started: float = 0.0
    device_name: str = ""
    memory_total: int | None = None
    """Bytes."""
    memory_used: int | None = None
    """Bytes."""
    loaded: str | None = None
    """The model that is warm."""
    warm: tuple[str, ...] = ()
    """All models on the device."""
    jobs: tuple[str, ...] = ()
    """Those that it renders now."""
    steps_per_s: float | None = None
    """Steps of all its jobs together, over the last half minute; None before it made any."""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def serves(self) -> frozenset[str]:
        """The models whose jobs it takes: those named, else all that it has."""
        return frozenset(self.models) or frozenset(
            str(entry.get("name")) for entry in self.catalogue if entry.get("kind") == "model"
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self) | {"features": sorted(self.features)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "WorkerRecord":
        """The record that `to_json` wrote; keys of a newer version are left out."""
        known = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        known["features"] = frozenset(known.get("features", ()))
        for name in ("catalogue", "models", "warm", "jobs"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Count:
    """How many jobs of one kind."""

    state: JobState
    model: str
    method: str
    """Empty where the submission did not tell."""
    jobs: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a queued job stands among those of its model."""

    ahead: int
    """Jobs that come before it: all of better classes, and those of its class whose turn is sooner."""
    has_message: bool
    """False: its owner's window of messages is full, so it waits for one of theirs to start."""
    waited_s: float


@dataclass(frozen=True, slots=True)
class QueueState:
    """One model's queue."""

    model: str
    depth: int
    """Queued jobs, of all priorities and owners, with a message or without."""
    oldest_s: float | None
    """How long the oldest has waited; None: nothing waits."""
    running: int
    per_s: float | None
    """Jobs that ended per second in which any ran, over the last ten minutes; None: none did."""

    @property
    def eta_s(self) -> float | None:
        """Seconds until the queue is empty if nothing is added; None while the rate is not known."""
        if not self.depth:
            return 0.0
        return self.depth / self.per_s if self.per_s else None


@dataclass(frozen=True, slots=True)
class Event:
    """Something changed. Events may be dropped; the record is the truth."""

    job_id: str
    state: JobState
    stage: str | None = None
    step: int = 0
    of: int = 0
    attempt: int = 0
    at: float = 0.0
