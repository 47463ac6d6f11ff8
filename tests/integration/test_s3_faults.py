"""An S3 server that hangs, fails, resets or is full: what a worker and a producer make of it."""

import json
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overpaint_producer.client import Farm
from overpaint_shared.errors import StoreError, StoreFailing, StoreFull, StoreUnreachable
from overpaint_shared.ledger import JobState
from overpaint_shared.settings import Settings
from overpaint_shared.store import Store
from overpaint_worker.storage import WAITING
from tests.integration.hand import job, png, working
from tests.proxy import CUT, HANG, PASS, RESET, SLOW, Behaviour, S3Proxy
from tests.waiting import wait_until
from tests.workers import OWNER, TestFarm, WorkerProcess

OVERPAINT = str(Path(sysconfig.get_path("scripts")) / "overpaint")
DONE = JobState.DONE


@pytest.fixture
def proxy(farm_settings: Settings) -> Iterator[S3Proxy]:
    with S3Proxy(str(farm_settings.s3_endpoint_url)) as made:
        yield made


def behind(farm: TestFarm, proxy: S3Proxy, **options: object) -> WorkerProcess:
    """A worker that reaches S3 through the proxy."""
    return farm.start(environment={"OVERPAINT_S3_ENDPOINT_URL": proxy.url}, **options).ready()


def quick(settings: Settings, proxy: S3Proxy) -> Store:
    changed = settings.model_copy(update={"s3_endpoint_url": proxy.url, "s3_timeout_s": 6.0})
    return Store(changed.store())


# A worker


def test_a_cancel_ends_a_job_within_seconds_though_s3_hangs(farm: TestFarm, proxy: S3Proxy) -> None:
    behind(farm, proxy)
    proxy.rule(HANG)
    (job_id,) = farm.submit(farm.spec())
    wait_until(lambda: proxy.met("GET .*/inputs/"))
    began = time.monotonic()
    farm.ledger.cancel(job_id)
    farm.until(job_id, JobState.CANCELLED, within_s=10)
    assert time.monotonic() - began < 5


def test_while_s3_is_away_leases_are_kept_nothing_is_claimed_and_nothing_rendered_again(
    farm: TestFarm, proxy: S3Proxy
) -> None:
    worker = behind(farm, proxy, slots=2)
    running = farm.submit(*[farm.spec(steps=30, step_s=0.05) for _ in range(2)])
    for job_id in running:
        farm.stepping(job_id)
    proxy.rule(503)
    waiting = farm.submit(*[farm.spec(steps=2) for _ in range(4)])
    for job_id in running:
        wait_until(lambda i=job_id: farm.job(i).stage == WAITING)
    worker.until("store.away")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + farm.settings.lease_s + 1)
    assert {farm.job(i).state for i in running} == {JobState.RUNNING}
    assert {farm.job(i).state for i in waiting} == {JobState.QUEUED}
    wait_until(lambda: {w.more.get("waits_for") for w in farm.ledger.workers()} == {"S3"})
    proxy.rule(PASS)
    assert farm.all_ended([*running, *waiting], within_s=20) == {DONE: 6}
    assert {farm.job(i).attempt for i in (*running, *waiting)} == {1}
    assert len([e for e in worker.events if e["event"] == "admitted"]) == 6
    worker.until("store.back")


def test_a_worker_whose_last_attempt_was_cancelled_notices_that_s3_is_back(
    farm: TestFarm, proxy: S3Proxy
) -> None:
    worker = behind(farm, proxy)
    proxy.rule(503)
    (job_id,) = farm.submit(farm.spec())
    worker.until("store.away")
    farm.ledger.cancel(job_id)
    farm.until(job_id, JobState.CANCELLED)
    (later,) = farm.submit(farm.spec())
    proxy.rule(PASS)
    farm.until(later, DONE)
    assert farm.job(later).attempt == 1


@pytest.mark.parametrize("behaviour", [500, CUT, HANG])
def test_one_picture_that_s3_cannot_give_holds_up_no_other_job(
    behaviour: Behaviour, farm: TestFarm, proxy: S3Proxy
) -> None:
    worker = behind(farm, proxy, slots=2)
    damaged = farm.store.put_input(OWNER, b"on a sector that is lost")
    proxy.rule(behaviour, f"GET .*{damaged}")
    (bad,) = farm.submit(farm.spec() | {"source": {"image": f"sha256:{damaged}"}})
    wait_until(lambda: farm.job(bad).stage == WAITING)
    others = farm.submit(*[farm.spec(steps=1) for _ in range(3)])
    assert farm.all_ended(others, within_s=30) == {DONE: 3}
    assert farm.job(bad).state is JobState.RUNNING
    assert worker.said("store.away") == []
    proxy.rule(PASS)
    farm.until(bad, DONE)


def test_a_picture_of_another_bucket_that_is_refused_fails_its_job_alone(
    farm: TestFarm, proxy: S3Proxy
) -> None:
    worker = farm.start(
        environment={"OVERPAINT_S3_ENDPOINT_URL": proxy.url, "OVERPAINT_S3_READ_BUCKETS": "other"}
    ).ready()
    proxy.rule(403, "GET /other/")
    (bad,) = farm.submit(farm.spec() | {"source": {"image": "s3://other/gone.png"}})
    error = farm.until(bad, JobState.FAILED).error or {}
    assert (error["code"], error["field"]) == ("input", "source.image")
    assert "no permission" in error["message"]
    assert worker.said("store.away") == []


# A producer


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [(500, StoreFailing), (503, StoreFailing), (507, StoreFull), (RESET, StoreUnreachable)],
)
def test_each_failure_of_s3_has_its_own_error(
    behaviour: Behaviour, kind: type[StoreError], farm_settings: Settings, proxy: S3Proxy
) -> None:
    store = quick(farm_settings, proxy)
    proxy.rule(behaviour)
    with pytest.raises(StoreError) as caught:
        store.put_input("ann", b"picture")
    assert type(caught.value) is kind
    assert caught.value.fix
    proxy.rule(PASS)
    sha256 = store.put_input("ann", b"picture")
    proxy.rule(CUT, "GET")
    with pytest.raises(StoreUnreachable):
        store.get_input("ann", sha256, 1000)


def test_a_slow_server_is_waited_for(farm_settings: Settings, proxy: S3Proxy) -> None:
    store = quick(farm_settings, proxy)
    sha256 = store.put_input("ann", b"slow")
    told: list[str] = []
    store.on_wait = told.append
    proxy.rule(SLOW)
    assert store.get_input("ann", sha256, 1000) == b"slow"
    assert "has not answered for 3 s" in told[0]


def test_a_submit_to_an_s3_that_never_answers_says_so_at_once_and_ends_in_time(
    farm_settings: Settings, proxy: S3Proxy, tmp_path: Path
) -> None:
    for number in range(40):  # more than are sent at a time
        (tmp_path / f"{number}.png").write_bytes(png((8, 8 + number)))
        spec = job(source={"image": f"{number}.png"})
        (tmp_path / f"{number}.json").write_text(json.dumps(spec))
    environment = {
        "PATH": "/usr/bin:/bin",
        "OVERPAINT_REDIS_URL": str(farm_settings.redis_url),
        "OVERPAINT_S3_ENDPOINT_URL": proxy.url,
        "OVERPAINT_S3_BUCKET": farm_settings.s3_bucket,
        "OVERPAINT_S3_ACCESS_KEY": str(farm_settings.s3_access_key),
        "OVERPAINT_S3_SECRET_KEY": farm_settings.s3_secret_key.get_secret_value(),  # type: ignore[union-attr]
        "OVERPAINT_S3_TIMEOUT_S": "9",
    }
    proxy.rule(HANG)
    with Farm.connect(farm_settings) as farm, working(farm):
        ended = subprocess.run(
            [OVERPAINT, "submit", *map(str, sorted(tmp_path.glob("*.json")))],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 3, ended.stderr
    lines = ended.stderr.splitlines()
    assert "has not answered for 3 s; it is tried again, for 9 s at most" in lines[0]
    assert "does not answer" in lines[-1]
    assert len(lines) < 10
