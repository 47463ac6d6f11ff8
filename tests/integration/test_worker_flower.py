"""What operators see: Flower beside a real worker."""

import json
import subprocess
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from overpaint_producer.children import guarded
from overpaint_producer.services import free_ports
from overpaint_shared.ledger import JobState
from tests.waiting import wait_until
from tests.workers import REPOSITORY, TestFarm

USER = "tester:secret"


class Flower:
    def __init__(self, farm: TestFarm, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api"
        options = [f"--port={port}", "--address=127.0.0.1", f"--basic_auth={USER}", "--read_only=False"]
        broker = f"--broker={farm.settings.redis_url}"
        self.popen = subprocess.Popen(
            guarded([sys.executable, "-m", "celery", broker, "flower", *options]),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, path: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(self.url + path, data=data)  # noqa: S310  # our own address
        request.add_header("Authorization", "Basic " + b64encode(USER.encode()).decode())
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return json.load(answer)

    def up(self) -> bool:
        with suppress(OSError):
            # By its events. The list without `status` is what answered when Flower started.
            return True in self.ask("/workers?status=1").values()
        return False

    def tasks(self) -> dict[str, dict[str, Any]]:
        return dict(self.ask("/tasks?limit=100"))


@pytest.fixture
def flower(farm: TestFarm) -> Iterator[Flower]:
    made = Flower(farm, free_ports(1)[0])
    yield made
    made.popen.kill()
    made.popen.wait()


def test_flower_shows_one_task_for_each_job_and_revokes_them(farm: TestFarm, flower: Flower) -> None:
    worker = farm.start(remote_control="all").ready()
    wait_until(flower.up, within_s=60, what="Flower sees the worker")
    done, failed, cancelled, revoked = farm.submit(
        farm.spec(steps=20, step_s=0.01), farm.spec(do="fail"), farm.long(), farm.long()
    )
    farm.until(done, JobState.DONE)
    farm.until(failed, JobState.FAILED)
    farm.stepping(cancelled)
    farm.ledger.cancel(cancelled)
    farm.until(cancelled, JobState.CANCELLED)
    farm.stepping(revoked)
    flower.ask(f"/task/revoke/{revoked}", data=b"")
    farm.until(revoked, JobState.CANCELLED)
    worker.until("job.revoked", job=revoked)

    wanted = {done: "SUCCESS", failed: "FAILURE", cancelled: "REVOKED", revoked: "REVOKED"}
    seen = wait_until(
        lambda: (t := flower.tasks()) and {i: t.get(i, {}).get("state") for i in wanted} == wanted and t,
        what="Flower shows the four jobs as they ended",
    )
    assert seen.keys() == wanted.keys(), "one task for each job"
    for job_id in wanted:
        assert seen[job_id]["name"] == "overpaint.render"
        assert seen[job_id]["args"] == "tiny img2img 64x64"
    assert 0.2 <= seen[done]["runtime"] < 20
    assert "told to fail" in seen[failed]["exception"]


def test_a_revoked_job_can_be_replayed_on_the_same_worker(farm: TestFarm) -> None:
    """Celery itself would drop its messages for three hours."""
    worker = farm.start(remote_control="all").ready()
    (job_id,) = farm.submit(farm.spec(do="fail"))
    farm.until(job_id, JobState.FAILED)
    farm.app.control.revoke(job_id)
    worker.until("job.revoked", job=job_id)
    from overpaint_shared.queues import publish

    publish(farm.app, farm.ledger.replay(job_id))
    wait_until(lambda: farm.job(job_id).attempt == 1 and farm.job(job_id).state is JobState.FAILED)
    assert len(worker.said("job.claimed", job=job_id)) == 2
