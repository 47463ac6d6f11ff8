"""Why a job waits: its place in the queue, and what each live worker says to it. Pure; reads nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from overpaint_producer.pace import clock
from overpaint_shared.ledger import JobRecord, JobState, Place, QueueState, WorkerRecord


@dataclass(frozen=True)
class Verdict:
    """One live worker and the job."""

    worker: str
    device: str
    can: bool
    """Whether it may take the job at all."""
    why: str
    """Why not, or what keeps it from taking the job now."""
    running: int
    slots: int
    jobs: tuple[str, ...]
    """What it renders now."""


@dataclass(frozen=True)
class Why:
    """What there is to say about a job that waits, or does not."""

    job: str
    state: JobState
    reason: str
    """A stable word: `ended`, `running`, `no_worker`, `no_model`, `refused`, `window`, `behind`, `slots`,
    `other_model` or `next`.
    """
    text: str
    model: str
    ahead: int | None
    waited_s: float | None
    eta_s: float | None
    """Seconds until it starts, from the queue's rate; None while that is not known."""
    workers: tuple[Verdict, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def explain(
    record: JobRecord,
    place: Place | None,
    queue: QueueState | None,
    workers: Sequence[WorkerRecord],
    running: Mapping[str, JobRecord],
    *,
    now: float | None = None,
) -> Why:
    """Why `record` waits. `running` holds the records of what the workers render; `now` is Redis' time."""
    verdicts = tuple(_verdict(record, worker, running) for worker in workers)
    if place is None:
        reason, text = _not_waiting(record)
        return Why(record.id, record.state, reason, text, record.model, None, None, None, verdicts)
    reason, text = _waiting(record, place, verdicts, [w for w in workers if record.model in w.serves])
    if record.deadline is not None and now is not None:
        text += f"; it fails in {clock(max(0.0, record.deadline - now))} unless it has ended"
    rate = queue.per_s if queue else None
    eta = (place.ahead + 1) / rate if rate and any(verdict.can for verdict in verdicts) else None
    return Why(
        record.id, record.state, reason, text, record.model, place.ahead, place.waited_s, eta, verdicts
    )


def _not_waiting(record: JobRecord) -> tuple[str, str]:
    if record.state not in {JobState.RUNNING, JobState.CANCELLING}:
        return "ended", f"it does not wait: it is {record.state}"
    step = f" {record.step}/{record.of}" if record.of else ""
    return "running", f"it does not wait: {record.worker_name} renders it ({record.stage or 'fetch'}{step})"


def _waiting(
    record: JobRecord, place: Place, verdicts: Sequence[Verdict], readers: Sequence[WorkerRecord]
) -> tuple[str, str]:
    if not verdicts:
        return "no_worker", "no worker is alive; start one with: overpaint-worker"
    if not readers:
        return (
            "no_model",
            (f"no live worker serves model {record.model}; start one with --models {record.model}"),
        )
    able = [verdict for verdict in verdicts if verdict.can]
    if not able:
        return "refused", f"no live worker of model {record.model} can render it: {_refusal(verdicts)}"
    if not place.has_message:
        return "window", (
            f"before it in the queue of model {record.model}: {_jobs(place.ahead)}, and its owner has as many"
            " in the queue as one may have at a time"
        )
    if place.ahead:
        return "behind", f"before it in the queue of model {record.model}: {_jobs(place.ahead)}"
    if all(worker.more.get("waits_for") for worker in readers):
        return "store", "it is next, and every worker of its model waits for S3, which is away"
    if all(verdict.running >= verdict.slots for verdict in able):
        return "slots", "it is next, and every worker that can render it is full"
    if all(_elsewhere(record, worker) for worker in readers):
        return "other_model", (
            "it is next, and every worker of its model renders another one now;"
            " they turn to it once idle, or once it has waited as long as --switch-after says"
        )
    return "next", "it is next; a worker has room and takes it in a moment"


def _elsewhere(record: JobRecord, worker: WorkerRecord) -> bool:
    return bool(worker.running) and record.model not in worker.warm


def _refusal(verdicts: Sequence[Verdict]) -> str:
    return "; ".join(f"{verdict.worker}: {verdict.why}" for verdict in verdicts if not verdict.can)


def _verdict(record: JobRecord, worker: WorkerRecord, running: Mapping[str, JobRecord]) -> Verdict:
    refusal = _cannot(record, worker)
    return Verdict(
        worker=worker.name,
        device=f"{worker.device} {worker.device_name}".strip(),
        can=refusal is None,
        why=refusal or _does(record, worker, running),
        running=worker.running,
        slots=worker.slots,
        jobs=worker.jobs,
    )


def _cannot(record: JobRecord, worker: WorkerRecord) -> str | None:
    if record.model not in worker.serves:
        return f"serves {' '.join(sorted(worker.serves)) or 'no model'}"
    if missing := sorted(record.features - worker.features):
        return f"cannot render {', '.join(missing)}"
    if worker.id in record.excluded:
        return f"has refused it: {record.fault or 'unable'}"
    return None


def _does(record: JobRecord, worker: WorkerRecord, running: Mapping[str, JobRecord]) -> str:
    if worker.more.get("waits_for") == "S3":
        return "waits for S3, which is away"
    if not worker.running:
        warm = "" if record.model in worker.warm else ", and has to load the model"
        return f"idle{warm}"
    models = sorted({running[job].model for job in worker.jobs if job in running})
    of = f" of {' and '.join(models)}" if models else ""
    full = ", and is full" if worker.running >= worker.slots else ""
    return f"renders {_jobs(worker.running)}{of}{full}"


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def when(seconds: float | None) -> str:
    """`in about 2:05`, or that nobody knows."""
    return "not known yet" if seconds is None else f"in about {clock(seconds)}"
