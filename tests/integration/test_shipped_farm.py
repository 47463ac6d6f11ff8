"""The farm as shipped: a job goes through it, and its roles are refused nothing that they need."""

from pathlib import Path

from overpaint_shared.ledger import JobState
from tests.shipped import Shipped, ShippedFarm


def test_a_job_goes_through_the_farm_as_shipped(shipped: Shipped, shipped_farm: ShippedFarm) -> None:
    worker = shipped_farm.start().ready()
    assert "OVERPAINT_REDIS_WORKER_PASSWORD" in shipped_farm.surroundings()
    (job_id,) = shipped_farm.submit(shipped_farm.spec())
    record = shipped_farm.until(job_id, JobState.DONE)
    assert record.worker_name is not None
    assert record.worker_name.startswith("gpu0@")
    with shipped.redis.client() as client:
        users = {each["user"] for each in client.client_list()}
        assert client.info()["valkey_version"].startswith("8.")
        assert client.config_get("maxmemory") == {"maxmemory": str(2 * 1024**3)}
    assert users == {"producer", "worker", "operator"}
    assert shipped.redis.denied() == set()
    worker.terminate()
    assert worker.wait() == 0


def test_a_producer_that_lists_workers_asks_for_nothing_that_it_may_not(
    shipped: Shipped, tmp_path: Path
) -> None:
    with shipped.redis.client() as operator:
        operator.acl_log_reset()
        operator.sadd("op:workers", "dead")
        farm = shipped.farm(tmp_path)
        assert farm.ledger.workers() == []
        assert shipped.redis.denied() == set()
    farm.end()


def test_a_server_can_be_frozen_and_thawed(own_redis: Shipped) -> None:
    own_redis.redis.freeze()
    assert not own_redis.redis.answers()
    own_redis.redis.thaw()
    assert own_redis.redis.answers()
