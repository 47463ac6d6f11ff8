"""`overpaint doctor` on the farm as shipped: all is OK, and whatever is broken is told."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from overpaint_producer.client import Farm
from overpaint_producer.doctor import examine
from overpaint_producer.services import free_ports
from overpaint_shared import __version__
from overpaint_shared.ledger import WorkerRecord
from overpaint_shared.settings import RedisUrl, Settings
from tests.acceptance.commands import Result, Shell, environment
from tests.shipped import ROLES, Shipped, ShippedFarm


def doctor(settings: Settings, folder: Path, *argv: str) -> Result:
    return Shell(folder, environment(settings)).overpaint("doctor", "--json", *argv)


def told(result: Result) -> dict[str, str]:
    """What is not OK: check -> level."""
    return {line["check"]: line["level"] for line in result.lines if line["level"] != "ok"}


def test_the_farm_as_shipped_is_sound_for_every_role(shipped: Shipped, shipped_farm: ShippedFarm) -> None:
    shipped_farm.start().ready()
    for role in ROLES:
        result = doctor(shipped.settings(role), shipped_farm.folder)
        levels = {line["level"] for line in result.lines}
        assert result.code == 0, result.out
        assert levels <= ({"ok"} if role == "operator" else {"ok", "skipped"}), result.out
        checks = {line["check"] for line in result.lines}
        assert {"redis.appendonly", "farm.workers", "s3.conditional", "local.packages"} <= checks
    assert shipped.redis.denied() == set()
    left = shipped.s3.client().list_objects_v2(Bucket="overpaint", Prefix="results/doctor-")
    assert left.get("KeyCount", 0) == 0


def test_it_is_told_for_people_with_what_to_do(shipped: Shipped, tmp_path: Path) -> None:
    shell = Shell(tmp_path, environment(shipped.settings("operator")))
    result = shell.overpaint("doctor", "--quiet")
    assert result.code == 1
    assert result.out.splitlines() == [
        "WRONG   farm.workers            no worker is alive, so no job is rendered",
        "                                -> start one: overpaint-worker",
    ]
    assert result.err.startswith("overpaint: ")


def nearly_full(client: "redis.Redis") -> None:
    """What clients hold counts, too, and comes and goes: fill it, so that this is a small share."""
    for number in range(64):
        client.set(f"filling{number}", "x" * (1 << 18))
    client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.02))


Break = Callable[["redis.Redis"], object]


@pytest.mark.parametrize(
    ("how", "check", "level"),
    [
        (lambda client: client.config_set("appendonly", "no"), "redis.appendonly", "wrong"),
        (lambda client: client.config_set("maxmemory-policy", "allkeys-lru"), "redis.policy", "wrong"),
        (nearly_full, "redis.memory", "wrong"),
        (lambda client: client.config_set("appendfsync", "no"), "redis.appendfsync", "warn"),
        (
            lambda client: client.execute_command("ACL", "SETUSER", "default", "-@all"),
            "redis.default_user",
            "wrong",
        ),
        (lambda client: client.acl_deluser("monitor"), "redis.roles", "warn"),
        (lambda client: client.zadd("op:leases", {"lost": time.time() - 1000}), "farm.leases", "wrong"),
        (lambda client: client.rpush("op:quarantine", "odd"), "farm.quarantine", "warn"),
        (lambda client: client.zadd("op:state:dead", {"x": 1}), "farm.dead", "warn"),
        (lambda client: client.replicaof("127.0.0.1", 1), "redis.role", "wrong"),
    ],
)
def test_what_is_broken_in_redis_is_told(own_redis: Shipped, how: Break, check: str, level: str) -> None:
    announce(own_redis)
    with own_redis.redis.client() as client:
        how(client)
    found = {each.check: each.level for each in examine(own_redis.settings("operator")).findings}
    assert {name: its for name, its in found.items() if its not in {"ok", "skipped"}} == {check: level}


def announce(farm: Shipped, **changes: Any) -> None:
    values = {"id": "w", "name": "gpu0@a", "host": "a", "device": "cpu", "slots": 1, "version": __version__}
    with Farm.connect(farm.settings("worker")) as worker:
        worker.ledger.announce(WorkerRecord(**(values | changes)), ttl=600)


def test_a_worker_of_another_version_and_a_queue_without_one_are_told(
    shipped: Shipped, tmp_path: Path
) -> None:
    announce(shipped, version="0.0.1", models=("tiny",))
    with shipped.redis.client() as client:
        client.zadd("op:queued:other", {"x": time.time()})
        client.hset("op:census", "queued|other|img2img", 1)
    result = doctor(shipped.settings("operator"), tmp_path)
    assert told(result) == {"farm.versions": "warn", "farm.queues": "wrong"}
    assert result.code == 1


def test_a_configuration_file_that_others_may_read_is_told(shipped: Shipped, tmp_path: Path) -> None:
    announce(shipped)
    settings = shipped.settings("producer")
    assert settings.s3_secret_key is not None
    config = tmp_path / "farm.toml"
    given = {
        "redis_url": str(settings.redis_url),
        "s3_endpoint_url": settings.s3_endpoint_url,
        "s3_access_key": settings.s3_access_key,
        "s3_secret_key": settings.s3_secret_key.get_secret_value(),
    }
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items()))
    shell = Shell(tmp_path, environment())
    config.chmod(0o644)
    result = shell.overpaint("doctor", "--json", "--config", str(config))
    found = [line for line in result.lines if line["check"] == "local.config"]
    assert (result.code, found[0]["level"]) == (1, "wrong")
    assert found[0]["fix"].startswith(f"chmod 600 {config}")
    assert given["s3_secret_key"] not in result.out + result.err
    config.chmod(0o600)
    assert shell.overpaint("doctor", "--config", str(config)).code == 0


def test_a_wrong_bucket_is_told(shipped: Shipped, tmp_path: Path) -> None:
    announce(shipped)
    result = doctor(shipped.settings("operator", s3_bucket="elsewhere"), tmp_path)
    assert told(result) == {"s3.reachable": "wrong"}
    assert "no bucket 'elsewhere'" in result.out
    assert result.code == 1


def test_a_store_that_hangs_does_not_hang_the_doctor(own_servers: Shipped, tmp_path: Path) -> None:
    announce(own_servers)
    own_servers.s3.freeze()
    try:
        began = time.monotonic()
        result = doctor(own_servers.settings("operator"), tmp_path, "--timeout", "3")
        took = time.monotonic() - began
    finally:
        own_servers.s3.thaw()
    assert told(result) == {"s3.reachable": "wrong"}
    assert result.code == 1
    assert took < 3 + 5


def test_redis_away_is_told_and_nothing_in_reach_is_exit_3(shipped: Shipped, tmp_path: Path) -> None:
    nowhere = free_ports(1)[0]
    url = RedisUrl(f"redis://:hidden-word@127.0.0.1:{nowhere}/0")
    away = shipped.settings("operator").model_copy(update={"redis_url": url})
    result = doctor(away, tmp_path)
    assert (result.code, told(result)) == (1, {"redis.reachable": "wrong"})
    assert "hidden-word" not in result.out + result.err
    neither = away.model_copy(update={"s3_endpoint_url": f"http://127.0.0.1:{nowhere}"})
    result = doctor(neither, tmp_path, "--timeout", "20")
    assert (result.code, set(told(result))) == (3, {"redis.reachable", "s3.reachable"})
