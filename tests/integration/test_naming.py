"""A picture under its job's name (`output.key`): that of the job submitted last, whoever sleeps or dies."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from overpaint_shared.ledger import Done, JobState
from overpaint_shared.store import Store
from overpaint_worker.naming import Named, complete
from tests.proxy import HOLD, PASS, S3Proxy
from tests.waiting import wait_until
from tests.workers import OWNER, TestFarm, WorkerProcess

DONE = JobState.DONE
KEY = "shots/12.png"


def named(farm: TestFarm, **script: Any) -> dict[str, Any]:
    return farm.spec(**script) | {"output": {"key": KEY}}


def shown(farm: TestFarm) -> bytes:
    """What stands under the name."""
    return farm.store.get(f"named/{OWNER}/{KEY}", 1000)


@pytest.fixture
def proxy(farm: TestFarm) -> Iterator[S3Proxy]:
    with S3Proxy(str(farm.settings.s3_endpoint_url)) as made:
        yield made


def behind(farm: TestFarm, proxy: S3Proxy) -> WorkerProcess:
    """A worker that reaches S3 through the proxy."""
    return farm.start(environment={"OVERPAINT_S3_ENDPOINT_URL": proxy.url}).ready()


def test_a_worker_that_froze_while_it_named_a_picture_does_not_overwrite_a_later_jobs(
    farm: TestFarm, proxy: S3Proxy
) -> None:
    stale = behind(farm, proxy)
    proxy.rule(HOLD, "PUT .*/named/")
    (first,) = farm.submit(named(farm))
    wait_until(lambda: proxy.met("PUT .*/named/"))
    assert farm.job(first).state is JobState.RUNNING, "not done before its picture has its name"
    os.killpg(stale.popen.pid, signal.SIGSTOP)
    try:
        farm.start().ready()
        record = farm.until(first, DONE)
        assert (record.attempt, record.lost_hosts) == (1, 0), "it was committed, so it is not rendered again"
        assert shown(farm) == b"picture of " + first.encode()
        (later,) = farm.submit(named(farm))
        farm.until(later, DONE)
        assert shown(farm) == b"picture of " + later.encode()
    finally:
        os.killpg(stale.popen.pid, signal.SIGCONT)
    proxy.rule(PASS)
    stale.until("job.done", job=first)
    assert shown(farm) == b"picture of " + later.encode()
    files = (farm.job(first).result or {})["files"]
    assert farm.store.get(files["image.png"], 1000) == b"picture of " + first.encode()


def test_a_worker_that_dies_before_it_named_a_picture_has_it_named_by_another(
    farm: TestFarm, proxy: S3Proxy
) -> None:
    doomed = behind(farm, proxy)
    proxy.rule(HOLD, "PUT .*/named/")
    (job_id,) = farm.submit(named(farm))
    wait_until(lambda: proxy.met("PUT .*/named/"))
    doomed.kill_group()
    other = farm.start().ready()
    assert farm.until(job_id, DONE).attempt == 1
    assert shown(farm) == b"picture of " + job_id.encode()
    other.until("job.named", job=job_id)


def test_the_job_that_was_submitted_last_has_the_name_whichever_ends_last(farm: TestFarm) -> None:
    farm.start().ready()
    early, late = farm.submit(named(farm, steps=60, step_s=0.02), named(farm, steps=2))
    farm.until(late, DONE)
    farm.until(early, DONE)
    assert farm.job(early).ended > farm.job(late).ended  # type: ignore[operator]
    assert shown(farm) == b"picture of " + late.encode()


class Interrupted(Store):
    """A store in which something happens between the question who has the name and the write."""

    between: Callable[[], None] | None = None
    conditions = True

    def _put_over(self, key: str, data: bytes, content_type: str, found: dict[str, Any] | None) -> bool:
        if self.between:
            (happens, self.between) = (self.between, None)
            happens()
        if self.conditions:
            return super()._put_over(key, data, content_type, found)
        self._s3.put_object(Bucket=self.settings.bucket, Key=key, Body=data, ContentType=content_type)
        return True


def committed(farm: TestFarm) -> Named:
    """A job that is committed and waits for its name."""
    (job_id,) = farm.submit(named(farm))
    claim = farm.ledger.claim(job_id, "by hand")
    data = b"picture of " + job_id.encode()
    key = farm.store.put_result(job_id, claim.token, "image.png", data, "image/png")
    result = {"files": {"image.png": key}, "key": f"named/{OWNER}/{KEY}"}
    assert farm.ledger.finish(job_id, claim.token, Done(result, name=KEY)).naming
    return Named(job_id, OWNER, KEY, "image/png", data)


@pytest.mark.parametrize("conditions", [True, False], ids=["conditional PUT", "a server without"])
def test_a_name_that_a_later_job_takes_in_the_middle_of_a_write_stays_its(
    conditions: bool, farm: TestFarm
) -> None:
    store = Interrupted(farm.settings.store())
    store.conditions = conditions
    first = committed(farm)
    later: list[Named] = []

    def take() -> None:
        later.append(committed(farm))
        later[0].write(farm.store, farm.ledger)

    store.between = take
    first.write(store, farm.ledger)
    assert shown(farm) == later[0].data


def test_a_job_that_has_ended_is_not_named_again(farm: TestFarm) -> None:
    picture = committed(farm)
    finished = complete(farm.store, farm.ledger, picture.job)
    assert finished
    assert finished.accepted
    farm.store.put_named(OWNER, KEY, b"another", "image/png", allowed=lambda: True)
    assert complete(farm.store, farm.ledger, picture.job) is None
    assert shown(farm) == b"another"


def test_a_cancel_of_a_job_that_is_committed_comes_too_late_and_is_told(farm: TestFarm) -> None:
    """However long S3 hangs, the job is not shown as if it were about to be cancelled."""
    picture = committed(farm)
    assert farm.ledger.cancel(picture.job).state is JobState.RUNNING
    assert farm.job(picture.job).naming
    (line,) = farm.ledger.audit(action="cancel").lines
    assert line.changed == 0
    picture.write(farm.store, farm.ledger)
    record = farm.job(picture.job)
    assert farm.ledger.finish(picture.job, record.token, Done(record.result or {})).accepted
    assert farm.job(picture.job).state is DONE


@pytest.mark.parametrize(
    "result",
    [
        "no JSON",
        "{}",
        '{"files": {"image.png": 1}, "key": "named/default/a"}',
        '{"files": {"image.png": "results/x/1/image.png"}, "key": "named/default/../a"}',
    ],
)
def test_a_committed_job_whose_result_is_damaged_fails_and_does_not_wait_for_ever(
    result: str, farm: TestFarm, redis_client: redis.Redis
) -> None:
    job_id = committed(farm).job
    redis_client.hset(f"op:job:{job_id}", "result", result)
    finished = complete(farm.store, farm.ledger, job_id)
    assert finished is not None
    assert finished.accepted
    record = farm.job(job_id)
    assert record.state is JobState.FAILED
    assert (record.error or {})["code"] == "damaged_record"
    assert complete(farm.store, farm.ledger, job_id) is None
