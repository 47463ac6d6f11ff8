"""The doctor's checks on facts that are made by hand."""

import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from overpaint_producer.doctor import (
    Finding,
    Level,
    check_farm,
    check_local,
    check_server,
    check_store,
    check_users,
)
from overpaint_producer.doctor.examination import Gathering
from overpaint_producer.doctor.farm_facts import FarmFacts
from overpaint_producer.doctor.findings import Unknown, duration, size
from overpaint_producer.doctor.local_facts import ConfigFile, LocalFacts, _meets
from overpaint_producer.doctor.redis_facts import RedisFacts
from overpaint_producer.doctor.store_facts import StoreFacts
from overpaint_shared.catalogue import ModelTraits
from overpaint_shared.errors import StoreDenied
from overpaint_shared.ledger import JobState, QueueState, WorkerRecord

GIB = 1 << 30
INFO: dict[str, Any] = {
    "valkey_version": "8.1.8",
    "redis_version": "7.2.4",
    "redis_mode": "standalone",
    "role": "master",
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "aof_last_bgrewrite_status": "ok",
    "rdb_last_bgsave_status": "ok",
    "maxmemory_policy": "noeviction",
    "maxmemory": 2 * GIB,
    "used_memory": GIB,
}
SERVER = RedisFacts(
    address="rediss://operator:***@redis.example:6379/0",
    user="operator",
    info=INFO,
    config={"appendfsync": "everysec"},
    users=[
        "user default off resetchannels ~* &* +@all",
        "user producer on #0 resetchannels ~op:job:* -@all +get",
        "user worker on #1 ~op:* -@all +get",
        "user monitor on #2 -@all",
        "user operator on #3 ~* &* +@all",
    ],
    scripts=13,
)
WORKER = WorkerRecord(id="w", name="gpu0@a", host="a", device="cpu", slots=2, version="1.0", models=("sd15",))
FARM = FarmFacts(version="1.0", counts={JobState.DONE: 3}, workers=[WORKER])
STORE = StoreFacts(
    endpoint="https://s3.example",
    bucket="overpaint",
    rights=dict.fromkeys(("list", "write", "read", "delete")),
)
LOCAL = LocalFacts(
    version="1.0", python="3.12.1", packages={"redis": "7"}, disks={"/data": (GIB, GIB)}, memory=(GIB, GIB)
)


def told(findings: Iterable[Finding]) -> set[tuple[str, str]]:
    """What is not OK: (check, level)."""
    found = [each for each in findings if each.level is not Level.OK]
    assert all(each.fix for each in found), "each says what to do"
    return {(each.check, each.level.value) for each in found}


def of_server(facts: RedisFacts) -> set[tuple[str, str]]:
    return told([*check_server.check(facts), *check_users.check(facts)])


def test_a_sound_farm_is_ok_in_every_check() -> None:
    assert of_server(SERVER) == set()
    assert told(check_farm.check(FARM)) == set()
    assert told(check_store.check(STORE)) == set()
    assert told(check_local.check(LOCAL)) == set()


@pytest.mark.parametrize(
    ("info", "check", "level"),
    [
        ({"aof_enabled": 0}, "redis.appendonly", "wrong"),
        ({"aof_last_write_status": "err"}, "redis.appendonly_write", "wrong"),
        ({"aof_last_bgrewrite_status": "err"}, "redis.appendonly_rewrite", "wrong"),
        ({"rdb_last_bgsave_status": "err"}, "redis.snapshot", "warn"),
        ({"maxmemory_policy": "allkeys-lru"}, "redis.policy", "wrong"),
        ({"maxmemory": 0}, "redis.memory", "warn"),
        ({"used_memory": int(1.8 * GIB)}, "redis.memory", "warn"),
        ({"used_memory": int(1.99 * GIB)}, "redis.memory", "wrong"),
        ({"role": "slave", "master_host": "b", "master_port": 1}, "redis.role", "wrong"),
        ({"redis_mode": "cluster"}, "redis.cluster", "wrong"),
        ({"cluster_enabled": 1}, "redis.cluster", "wrong"),
        ({"valkey_version": "8.1.3"}, "redis.version", "warn"),
        ({"valkey_version": None, "redis_version": "5.0.7"}, "redis.version", "wrong"),
        ({"valkey_version": None, "redis_version": "next"}, "redis.version", "warn"),
    ],
)
def test_what_is_wrong_with_a_server_is_told(info: dict[str, Any], check: str, level: str) -> None:
    assert of_server(replace(SERVER, info=INFO | info)) == {(check, level)}


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("6.2.14", False),
        ("6.2.20", True),
        ("7.0.15", False),
        ("7.2.10", False),
        ("7.2.11", True),
        ("7.4.6", True),
        ("8.0.3", False),
        ("8.2.2", True),
        ("8.4.0", True),
    ],
)
def test_versions_of_redis_with_known_holes_are_told(version: str, *, good: bool) -> None:
    finding = check_server.version(replace(SERVER, info={"redis_version": version}))
    assert (finding.level is Level.OK) == good
    assert version in finding.text


@pytest.mark.parametrize(
    ("changes", "check", "level"),
    [
        ({"config": Unknown("no right")}, "redis.appendfsync", "skipped"),
        ({"config": {"appendfsync": "no"}}, "redis.appendfsync", "warn"),
        ({"latency_s": 0.2}, "redis.latency", "warn"),
        ({"latency_s": 2.0}, "redis.latency", "wrong"),
        ({"clock_ahead_s": -8.0}, "redis.clock", "warn"),
        ({"clock_ahead_s": 900.0}, "redis.clock", "wrong"),
        ({"address": "redis://producer:***@redis.example:6379/0"}, "redis.tls", "warn"),
        ({"scripts": "ERR unknown command"}, "redis.scripts", "wrong"),
        ({"scripts": "this user has no permissions to run 'script|load'"}, "redis.scripts", "skipped"),
        ({"users": Unknown("no right")}, "redis.users", "skipped"),
        ({"users": ["user default off -@all", *SERVER.users[1:]]}, "redis.default_user", "wrong"),
        (
            {"users": ["user default on #1 ~a:* -@all", *SERVER.users[1:]]},
            "redis.default_user",
            "wrong",
        ),
        (
            {"users": ["user default off ~* &* +@all -@write -evalsha", *SERVER.users[1:]]},
            "redis.default_user",
            "wrong",
        ),
        ({"users": ["user default on nopass ~* +@all", *SERVER.users[1:]]}, "redis.default_user", "wrong"),
        ({"users": [*SERVER.users[:1], *SERVER.users[2:]]}, "redis.roles", "warn"),
        (
            {"users": [*SERVER.users[:1], "user producer on ~* +@all", *SERVER.users[2:]]},
            "redis.rights",
            "warn",
        ),
    ],
)
def test_what_is_wrong_with_users_clock_and_network_is_told(
    changes: dict[str, Any], check: str, level: str
) -> None:
    assert of_server(replace(SERVER, **changes)) == {(check, level)}


def test_a_server_of_this_machine_alone_may_have_one_user_and_no_encryption() -> None:
    users = ["user default on #0 ~* &* +@all"]
    assert of_server(replace(SERVER, address="redis://:***@127.0.0.1:6379/0", users=users)) == set()


def another(**changes: Any) -> WorkerRecord:
    return replace(WORKER, **({"id": "v", "name": "gpu0@b"} | changes))


def weights(sha256: str) -> dict[str, Any]:
    return ModelTraits(name="sd15", kind="model", family="sd", sha256=sha256 * 64).to_json()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"counts": {JobState.DEAD: 2}}, {("farm.dead", "warn")}),
        ({"counts": Unknown("no right")}, {("farm.jobs", "skipped")}),
        ({"overdue_s": 30.0}, set()),
        ({"overdue_s": 300.0}, {("farm.leases", "wrong")}),
        ({"overdue_s": Unknown("no right")}, {("farm.leases", "skipped")}),
        ({"quarantined": 4}, {("farm.quarantine", "warn")}),
        ({"quarantined": Unknown("no right")}, {("farm.quarantine", "skipped")}),
        ({"workers": []}, {("farm.workers", "wrong")}),
        ({"workers": Unknown("no right")}, {("farm.workers", "skipped"), ("farm.catalogue", "skipped")}),
        ({"workers": [WORKER, another(version="0.9")]}, {("farm.versions", "warn")}),
        ({"queues": [QueueState("sdxl", 3, 9.0, 0, None)]}, {("farm.queues", "wrong")}),
        ({"queues": [QueueState("sdxl", 0, None, 0, None)]}, set()),
        (
            {"workers": [another(catalogue=(weights("a"),)), another(id="u", catalogue=(weights("b"),))]},
            {("farm.catalogue", "wrong")},
        ),
    ],
)
def test_what_is_wrong_with_the_farm_is_told(changes: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    assert told(check_farm.check(replace(FARM, **changes))) == expected


@pytest.mark.parametrize(
    ("changes", "check", "level"),
    [
        ({"rights": {"list": None, "write": StoreDenied("no", fix="grant it")}}, "s3.write", "wrong"),
        ({"conditional": False}, "s3.conditional", "wrong"),
        ({"conditional": Unknown("nothing could be written")}, "s3.conditional", "skipped"),
        ({"clock_ahead_s": 30.0}, "s3.clock", "warn"),
        ({"clock_ahead_s": -100.0}, "s3.clock", "wrong"),
        ({"clock_ahead_s": Unknown("it does not tell")}, "s3.clock", "skipped"),
        ({"endpoint": "http://s3.example"}, "s3.tls", "warn"),
        ({"open_grpc": (18888,)}, "s3.grpc", "wrong"),
        ({"versioning": "Enabled"}, "s3.versioning", "warn"),
        ({"lifecycle": ("inputs/old/",)}, "s3.lifecycle", "warn"),
        ({"lifecycle": ("",)}, "s3.lifecycle", "warn"),
    ],
)
def test_what_is_wrong_with_the_bucket_is_told(changes: dict[str, Any], check: str, level: str) -> None:
    assert told(check_store.check(replace(STORE, **changes))) == {(check, level)}


def test_a_lifecycle_rule_for_other_objects_is_nobodys_business() -> None:
    assert told(check_store.check(replace(STORE, lifecycle=("backups/",)))) == set()


@pytest.mark.parametrize(
    ("changes", "check", "level"),
    [
        ({"unmet": ("redis>=7 (installed: 5)",)}, "local.packages", "wrong"),
        ({"misspelt": ("OVERPAINT_REDISURL is no setting",)}, "local.settings", "warn"),
        ({"config": ConfigFile(path="f", mode=0o644, secrets=("redis_url",))}, "local.config", "wrong"),
        ({"config": ConfigFile(path="f", mode=0o622, secrets=())}, "local.config", "wrong"),
        ({"disks": {"/data": (GIB // 2, GIB)}}, "local.disk", "warn"),
        ({"disks": {"/data": (1, GIB)}}, "local.disk", "wrong"),
        ({"memory": (GIB // 4, GIB)}, "local.memory", "warn"),
        ({"memory": (1, GIB)}, "local.memory", "wrong"),
    ],
)
def test_what_is_wrong_with_this_machine_is_told(changes: dict[str, Any], check: str, level: str) -> None:
    assert told(check_local.check(replace(LOCAL, **changes))) == {(check, level)}


@pytest.mark.parametrize(
    "config",
    [
        ConfigFile(path="f", mode=0o600, secrets=("redis_url", "s3_secret_key")),
        ConfigFile(path="f", mode=0o644, secrets=()),
    ],
)
def test_a_private_file_or_one_without_secrets_is_fine(config: ConfigFile) -> None:
    assert check_local.config(config).level is Level.OK


@pytest.mark.parametrize(
    ("version", "wanted", "met"),
    [
        ("8.1.0", ">=7", True),
        ("6.4", ">=7", False),
        ("6.0.0", ">=5.7,<6", False),
        ("5.7.0", ">=5.7,<6", True),
    ],
)
def test_versions_of_packages_are_compared(version: str, wanted: str, *, met: bool) -> None:
    assert _meets(version, wanted) == met


def test_facts_that_do_not_come_are_told_in_time() -> None:
    never = threading.Event()
    began = time.monotonic()
    found = Gathering("hung", never.wait).facts("s3.reachable", "the S3 server", began + 0.1, 0.1)
    never.set()
    assert isinstance(found, Finding)
    assert (found.level, found.text) == (Level.WRONG, "the S3 server has not answered within 0.1 s")
    assert time.monotonic() - began < 5


def test_facts_that_fail_are_told_with_what_to_do() -> None:
    def fail() -> None:
        raise StoreDenied("cannot look: no S3 key is set", fix="set it")

    found = Gathering("s3", fail).facts("s3.reachable", "the S3 server", time.monotonic() + 10, 10)
    assert isinstance(found, Finding)
    assert (found.text, found.fix) == ("cannot look: no S3 key is set", "set it")


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5 s"), (40, "40 s"), (600, "10 min"), (8000, "2 h"), (864_000, "10 d")]
)
def test_durations_are_short(value: float, text: str) -> None:
    assert duration(value) == text


def test_sizes_are_short() -> None:
    assert [size(each) for each in (10, 2048, 3 * GIB, 5000 * GIB)] == ["10 B", "2 KiB", "3 GiB", "4.88 TiB"]
