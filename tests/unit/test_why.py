"""Why a job waits, for every reason there is."""

from dataclasses import replace
from typing import Any

import pytest

from overpaint_producer.why import Why, explain, when
from overpaint_shared.ledger import JobRecord, JobState, Place, QueueState, WorkerRecord

BLANK: dict[str, Any] = dict.fromkeys(
    "group submit_token started ended worker worker_name lease stage result error fault spec_json".split()  # noqa: SIM905
)
RECORD = JobRecord(
    **BLANK,
    id="j",
    owner="ann",
    state=JobState.QUEUED,
    model="sd15",
    priority=5,
    priority_class=3,
    title="",
    features=frozenset({"sampler:euler"}),
    labels={},
    created=0.0,
    since=0.0,
    attempt=0,
    crashes=0,
    lost_hosts=0,
    token=0,
    step=0,
    of=0,
    excluded=frozenset(),
)
WORKER = WorkerRecord(
    id="w1",
    name="gpu@host",
    host="host",
    device="cuda:0",
    slots=2,
    version="1",
    features=frozenset({"sampler:euler"}),
    models=("sd15", "sdxl"),
    warm=("sd15",),
)
QUEUE = QueueState("sd15", 4, 10.0, 1, 0.5)
FIRST = Place(0, has_message=True, waited_s=3.0)


def ask(
    place: Place | None = FIRST,
    workers: tuple[WorkerRecord, ...] = (WORKER,),
    record: JobRecord = RECORD,
    running: dict[str, JobRecord] | None = None,
) -> Why:
    return explain(record, place, QUEUE, workers, running or {})


def busy(model: str, count: int = 1) -> tuple[WorkerRecord, dict[str, JobRecord]]:
    jobs = tuple(f"r{number}" for number in range(count))
    return replace(WORKER, running=count, jobs=jobs, warm=(model,)), {
        job: replace(RECORD, id=job, model=model) for job in jobs
    }


def test_a_job_that_runs_or_has_ended_does_not_wait() -> None:
    running = replace(RECORD, state=JobState.RUNNING, worker_name="gpu@host", stage="denoise", step=3, of=20)
    found = ask(None, record=running)
    assert (found.reason, found.ahead, found.eta_s) == ("running", None, None)
    assert "gpu@host renders it (denoise 3/20)" in found.text
    assert ask(None, record=replace(RECORD, state=JobState.DONE)).reason == "ended"


def test_without_a_worker_it_says_what_to_start() -> None:
    assert (ask(workers=()).reason, ask(workers=()).eta_s) == ("no_worker", None)
    other = ask(workers=(replace(WORKER, models=("sdxl",)),))
    assert other.reason == "no_model"
    assert "--models sd15" in other.text
    assert other.workers[0].why == "serves sdxl"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (replace(RECORD, features=frozenset({"sampler:lcm", "lora"})), "cannot render lora, sampler:lcm"),
        (
            replace(RECORD, excluded=frozenset({"w1"}), fault="too little memory"),
            "refused it: too little memory",
        ),
    ],
)
def test_a_worker_that_cannot_says_why(record: JobRecord, why: str) -> None:
    found = ask(record=record)
    assert (found.reason, found.workers[0].can) == ("refused", False)
    assert why in found.workers[0].why
    assert why in found.text


def test_one_that_can_is_enough() -> None:
    found = ask(workers=(replace(WORKER, id="w2", features=frozenset()), WORKER))
    assert (found.reason, [worker.can for worker in found.workers]) == ("next", [False, True])


def test_jobs_before_it_and_the_owners_window_come_before_what_workers_do() -> None:
    assert ask(Place(1, has_message=True, waited_s=1)).text == "before it in the queue of model sd15: 1 job"
    assert ask(Place(7, has_message=True, waited_s=1)).reason == "behind"
    assert ask(Place(7, has_message=False, waited_s=1)).reason == "window"


def test_a_place_and_a_rate_make_a_time() -> None:
    found = ask(Place(7, has_message=True, waited_s=1))
    assert found.eta_s == 16.0  # eight jobs, one in two seconds
    assert when(found.eta_s) == "in about 0:16"
    assert when(None) == "not known yet"


def test_full_workers_and_workers_of_another_model_are_told_apart() -> None:
    full, jobs = busy("sd15", 2)
    assert ask(workers=(full,), running=jobs).reason == "slots"
    assert ask(workers=(full, replace(WORKER, id="w2")), running=jobs).reason == "next"
    other, jobs = busy("sdxl")
    found = ask(workers=(other,), running=jobs)
    assert (found.reason, found.workers[0].why) == ("other_model", "renders 1 job of sdxl")


def test_an_idle_worker_says_whether_it_must_load() -> None:
    assert ask().workers[0].why == "idle"
    assert ask(workers=(replace(WORKER, warm=()),)).workers[0].why == "idle, and has to load the model"


def test_all_of_it_is_plain_json() -> None:
    found = ask().to_json()
    assert found["workers"][0]["worker"] == "gpu@host"
    assert found["reason"] == "next"
