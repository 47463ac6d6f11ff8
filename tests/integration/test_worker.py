"""A real worker process on real Redis and S3, most with the fake engine."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from overpaint_shared.ledger import JobState
from overpaint_shared.queues import publish
from tests import fake_engine
from tests.waiting import wait_until
from tests.workers import REPOSITORY, TestFarm

HEAVY = ("torch", "diffusers", "transformers", "numpy", "scipy", "safetensors")


def test_a_job_goes_from_its_message_to_its_files_in_the_store(farm: TestFarm) -> None:
    worker = farm.start().ready()
    (job_id,) = farm.submit(farm.spec(steps=4))
    record = farm.until(job_id, JobState.DONE)
    assert record.result is not None
    assert record.result["files"].keys() == {"image.png", "receipt.json"}
    assert farm.store.get(record.result["files"]["image.png"], 1000) == b"picture of " + job_id.encode()
    assert record.result["summary"]["steps"] == 4
    assert record.result["summary"]["worker"]["seconds"].keys() >= {
        "claim_s",
        "fetch_s",
        "engine_s",
        "store_s",
    }
    assert [line["token"] for line in worker.said("job.done")] == [record.token]


def test_a_picture_is_stored_under_the_name_that_its_job_gives_it(farm: TestFarm) -> None:
    farm.start().ready()
    (job_id,) = farm.submit({**farm.spec(), "output": {"key": "shots/12.png"}})
    record = farm.until(job_id, JobState.DONE)
    assert record.result is not None
    assert record.result["key"] == f"named/{record.owner}/shots/12.png"
    assert farm.store.get(record.result["key"], 1000) == b"picture of " + job_id.encode()


def test_the_worker_process_never_maps_torch_or_numpy(farm: TestFarm) -> None:
    worker = farm.start().ready()
    (job_id,) = farm.submit(farm.spec())
    farm.until(job_id, JobState.DONE)
    maps = Path(f"/proc/{worker.popen.pid}/maps").read_text()
    assert "_ssl" in maps or "libpython" in maps or "python" in maps, "the map is that of a Python process"
    assert not [name for name in HEAVY if f"/{name}/" in maps]


def test_importing_the_worker_imports_no_heavy_library() -> None:
    code = f"""
import sys
import overpaint_worker.main, overpaint_worker.tasks, overpaint_worker.bootsteps, overpaint_worker.supervisor
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert out.stdout.strip() == "[]"


def test_jobs_that_wait_together_are_rendered_together(farm: TestFarm) -> None:
    worker = farm.start().ready()
    ids = farm.submit(*[farm.spec(steps=40) for _ in range(5)])
    assert farm.all_ended(ids) == {JobState.DONE: 5}
    assert max(event.get("company", 0) for event in worker.events) >= 3


def test_a_worker_holds_no_more_jobs_than_the_engine_has_credits_for(farm: TestFarm) -> None:
    worker = farm.start(slots=6, environment={fake_engine.CREDITS: "2"}).ready()
    ids = farm.submit(*[farm.spec(steps=15, step_s=0.01) for _ in range(8)])
    assert farm.all_ended(ids) == {JobState.DONE: 8}
    held = highest = 0
    for line in worker.lines:
        held += {"job.claimed": 1, "job.done": -1}.get(line.get("action", ""), 0)
        highest = max(highest, held)
    # One more may come in by the BRPOP that was under way when the last credit was used up.
    assert 2 <= highest <= 3


def test_two_models_are_not_mixed_and_each_is_loaded_once(farm: TestFarm) -> None:
    worker = farm.start(models=("a", "b"), switch_after_s=30).ready()
    specs = [farm.spec(model=model, steps=10) for _ in range(6) for model in ("a", "b")]
    assert farm.all_ended(farm.submit(*specs)) == {JobState.DONE: 12}
    order = [
        json.loads(farm.job(e["job"]).spec_json or "")["model"] for e in worker.events if e["event"] == "done"
    ]
    assert sum(before != after for before, after in pairwise(order)) == 1


def test_a_model_that_waits_long_enough_gets_its_turn_though_the_other_never_ends(farm: TestFarm) -> None:
    farm.start(models=("a", "b"), switch_after_s=1.0, slots=2).ready()
    stream = farm.submit(*[farm.spec(model="a", steps=20, step_s=0.01) for _ in range(100)])
    farm.until(stream[0], JobState.DONE)
    (late,) = farm.submit(farm.spec(model="b"))
    farm.until(late, JobState.DONE)
    assert farm.job(stream[-1]).state is JobState.QUEUED


def test_a_failed_job_keeps_its_typed_error_and_the_worker_goes_on(farm: TestFarm) -> None:
    farm.start().ready()
    bad, good = farm.submit(farm.spec(do="fail"), farm.spec())
    record = farm.until(bad, JobState.FAILED)
    assert record.error is not None
    assert (record.error["code"], record.error["field"]) == ("input", "prompt")
    farm.until(good, JobState.DONE)


def test_a_missing_input_fails_the_job_by_the_field_that_names_it(farm: TestFarm) -> None:
    farm.start().ready()
    spec = farm.spec()
    spec["source"]["image"] = "sha256:" + "0" * 64
    (job_id,) = farm.submit(spec)
    record = farm.until(job_id, JobState.FAILED)
    assert record.error is not None
    assert record.error["code"] == "input"
    assert record.error["field"] == "source.image"
    assert record.error["fix"]


def test_an_input_of_another_owner_is_not_read(farm: TestFarm) -> None:
    farm.start().ready()
    spec = farm.spec()
    spec["source"]["image"] = "sha256:" + farm.store.put_input("somebody-else", b"theirs")
    (job_id,) = farm.submit(spec)
    error = farm.until(job_id, JobState.FAILED).error
    assert error is not None
    assert error["code"] == "input"


def test_a_picture_in_a_bucket_that_is_not_allowed_is_refused(farm: TestFarm) -> None:
    farm.start().ready()
    spec = farm.spec()
    spec["source"]["image"] = "s3://private/secret.png"
    (job_id,) = farm.submit(spec)
    error = farm.until(job_id, JobState.FAILED).error
    assert error is not None
    assert error["code"] == "input"
    assert error["field"] == "source.image"


@pytest.mark.parametrize(("do", "reason"), [("unable", "unable"), ("oom", "no_memory")])
def test_a_job_that_no_worker_can_render_is_given_back_and_then_fails(
    farm: TestFarm, do: str, reason: str
) -> None:
    worker = farm.start().ready()
    (job_id,) = farm.submit(farm.spec(do=do))
    record = farm.until(job_id, JobState.FAILED)
    assert record.crashes == 0
    assert worker.said("job.released", reason=reason, job=job_id)
    assert record.error is not None
    assert record.error["code"] == "unsupported"


def test_a_spec_of_a_newer_version_is_given_back_uncounted(farm: TestFarm) -> None:
    worker = farm.start().ready()
    (job_id,) = farm.submit(farm.spec() | {"version": 99})
    assert worker.until("job.released", job=job_id)["reason"] == "unable"
    assert farm.job(job_id).crashes == 0


def test_a_cancelled_job_stops_and_the_engine_stays_warm(farm: TestFarm) -> None:
    worker = farm.start().ready()
    pid = worker.engine_pid
    (job_id,) = farm.submit(farm.long())
    farm.stepping(job_id)
    assert farm.ledger.cancel(job_id).state is JobState.CANCELLING
    farm.until(job_id, JobState.CANCELLED, within_s=5)
    assert [e["event"] for e in worker.events if e.get("job") == job_id][-1] == "cancelled"
    (after,) = farm.submit(farm.spec())
    farm.until(after, JobState.DONE)
    assert worker.engine_pid == pid
    assert [e["event"] for e in worker.events].count("loaded") == 1


def test_a_running_job_past_its_deadline_is_stopped_and_fails(farm: TestFarm) -> None:
    worker = farm.start().ready()
    (job_id,) = farm.submit(farm.long(), deadline_s=3.0)
    record = farm.until(job_id, JobState.FAILED, within_s=20)
    assert record.error is not None
    assert (record.error["code"], record.error["field"], record.attempt) == ("deadline", "deadline_s", 1)
    assert worker.until("job.failed")["job"] == job_id
    (after,) = farm.submit(farm.spec())
    farm.until(after, JobState.DONE)


def test_a_doubled_message_renders_nothing_twice(farm: TestFarm) -> None:
    worker = farm.start().ready()
    (job_id,) = farm.submit(farm.spec())
    farm.until(job_id, JobState.DONE)
    from overpaint_shared.ledger import Wakeup

    publish(farm.app, [Wakeup(job_id, "tiny", 3, "again")])
    assert worker.until("job.noop", job=job_id)["verdict"] == "skip"
    assert farm.commits() == {job_id: 1}


def test_a_running_worker_is_listed_with_what_it_offers_and_gone_when_it_stopped(farm: TestFarm) -> None:
    worker = farm.start(slots=5).ready()
    wait_until(farm.ledger.workers)
    (record,) = farm.ledger.workers()
    assert (record.device, record.slots, record.models) == ("cpu", 5, ("tiny",))
    assert record.more["versions"]["secrets"] == "", "the engine does not get the farm's secrets"
    worker.terminate()
    assert worker.wait() == 0
    assert farm.ledger.workers() == []


def without_redis(folder: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """What a worker says where no Redis answers."""
    registry = folder / "models.toml"
    registry.write_text('[models.tiny]\nfamily = "sd"\npath = "nowhere"\n')
    return subprocess.run(
        [sys.executable, "-m", "overpaint_worker.main", "--device", "cpu", "--registry", str(registry)],
        env={"PATH": "/usr/bin:/bin", "OVERPAINT_REDIS_URL": "redis://u:hush@127.0.0.1:1/0"} | more,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
        check=False,
    )


def test_a_worker_without_redis_says_so_in_one_line(tmp_path: Path) -> None:
    out = without_redis(tmp_path)
    assert out.returncode == 3
    assert "hush" not in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1
    assert out.stderr.startswith("overpaint-worker: ")


def test_a_worker_logs_a_misspelt_variable(tmp_path: Path) -> None:
    out = without_redis(tmp_path, OVERPAINT_WORKER_SLOT="3", OVERPAINT_S3_KEY_SECRET="hush")
    assert "Did you mean OVERPAINT_WORKER_SLOTS?" in out.stderr
    assert "hush" not in out.stdout + out.stderr
