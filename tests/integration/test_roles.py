"""The roles of Redis, tried from outside on the shipped server: what each must not do, and what it must."""

import json
import socket
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest
import redis
from redis.exceptions import NoPermissionError, ResponseError

from overpaint_producer import exporter
from overpaint_shared.errors import LedgerUnreachable
from overpaint_shared.ledger import JobState, Ledger, Submission, scripts
from overpaint_shared.queues import make_app, publish
from overpaint_shared.settings import Settings
from tests.integration.ledgers import worker as worker_record
from tests.shipped import Shipped, ShippedFarm
from tests.waiting import wait_until

LOOP = "while true do end"
ANYWHERE = [
    ("FLUSHALL",), ("FLUSHDB",), ("KEYS", "*"), ("SCAN", "0"), ("RANDOMKEY",), ("SHUTDOWN", "NOSAVE"),
    ("MONITOR",),
    ("CONFIG", "GET", "*"), ("CONFIG", "SET", "maxmemory", "1"), ("ACL", "LIST"),
    ("ACL", "SETUSER", "x", "on"),
    ("CLIENT", "LIST"), ("CLIENT", "KILL", "TYPE", "normal"), ("CLIENT", "PAUSE", "9999"),
    ("REPLICAOF", "127.0.0.1", "1"), ("PSYNC", "?", "-1"), ("BGREWRITEAOF",),
    ("MIGRATE", "h", "1", "k", "0", "9"),
    ("EVAL", LOOP, "0"), ("EVAL_RO", LOOP, "0"), ("FUNCTION", "LOAD", "x"), ("FCALL", "x", "0"),
    ("SCRIPT", "FLUSH"), ("SCRIPT", "KILL"), ("SWAPDB", "0", "1"), ("MODULE", "LIST"), ("SLOWLOG", "GET"),
    ("GET", "somebody:else"), ("SET", "somebody:else", "x"), ("DEL", "somebody:else"),
    ("PUBLISH", "somebody", "x"), ("PSUBSCRIBE", "*"),
]  # fmt: skip
DENIED: dict[str, list[tuple[str, ...]]] = {
    "producer": [
        *ANYWHERE,
        ("SCRIPT", "LOAD", LOOP),
        # Recovery.
        ("ZREM", "op:lanes", "0:m:o"), ("DEL", "op:lanes"), ("ZPOPMIN", "op:lanes"),
        ("ZADD", "op:leases", "1", "j"),
        ("ZREM", "op:leases", "j"), ("GET", "op:token"), ("SET", "op:token", "0"), ("INCR", "op:token"),
        ("DEL", "op:token"), ("DEL", "op:nothing:worker"), ("DEL", "op:moves"), ("DEL", "op:census"),
        # The limits of owners.
        ("HSET", "op:limits", "max_queued", "0"), ("HSET", "op:limits:ann", "max_queued", "0"),
        ("HDEL", "op:limits:ann", "max_queued"), ("DEL", "op:limits"),
        # A worker's place.
        ("HSET", "op:worker:w", "record", "{}"), ("DEL", "op:worker:w"), ("EXPIRE", "op:worker:w", "1"),
        ("SET", "op:workers", "x"), ("DEL", "op:workers"), ("SADD", "op:workers", "x"),
        ("SREM", "op:workers", "w"),
        # Whole records and queues.
        ("DEL", "op:job:j"), ("SET", "op:job:j", "x"), ("DEL", "op:spec:j"), ("APPEND", "op:spec:j", "x"),
        ("SETRANGE", "op:spec:j", "536870000", "x"), ("HINCRBY", "op:job:j", "attempt", "1"),
        ("HDEL", "op:tokens:o", "t"), ("DEL", "op:tokens:o"), ("ZREM", "op:owner:o", "j"),
        ("BRPOP", "m.tiny", "1"), ("RPOP", "m.tiny"), ("RPUSH", "m.tiny", "x"), ("DEL", "m.tiny"),
        ("LRANGE", "m.tiny", "0", "-1"), ("LTRIM", "m.tiny", "1", "0"), ("HSET", "op:pace:1", "m", "9"),
        ("HSET", "op:scripts", "x", "x"), ("HGETALL", "op:scripts"), ("LRANGE", "op:quarantine", "0", "-1"),
        ("DEL", "op:quarantine"),
        # What was noted of calls.
        *[
            (command, f"op:audit{whose}", *more)
            for whose in (":producer", "")
            for command, *more in (
                ("LRANGE", "0", "-1"), ("LTRIM", "1", "0"), ("DEL",), ("LSET", "0", "x"), ("LPOP",),
                ("RPOP",), ("LREM", "0", "x"), ("EXPIRE", "1"), ("RENAME", "op:rate:x"), ("SET", "x"),
            )
        ],
        ("RPUSH", "op:audit", "x"),
        ("SET", "op:limits", "x"), ("HSET", "op:limits", "jobs", "9"), ("DEL", "op:used:o"),
        # Celery's.
        ("HGETALL", "unacked"), ("DEL", "unacked_mutex"), ("SADD", "_kombu.binding.reply.celery.pidbox", "x"),
        ("PUBLISH", "/0.celery.pidbox", "{}"), ("PUBLISH", "/0.celeryev/worker.heartbeat", "{}"),
        ("SUBSCRIBE", "/0.celery.pidbox"),
    ],
    "worker": [*ANYWHERE],
    "monitor": [
        *ANYWHERE,
        ("EVALSHA", "0" * 40, "0"), ("DEL", "op:job:j"), ("HSET", "op:job:j", "state", "done"),
        ("GET", "op:spec:j"),
        ("SREM", "op:workers", "w"), ("LPUSH", "m.tiny", "x"), ("BRPOP", "m.tiny", "1"),
        ("ZADD", "op:lanes", "0", "x"),
        ("HSET", "op:scripts", "x", "x"), ("HGETALL", "op:tokens:o"), ("SET", "unacked_mutex", "x"),
        ("HGETALL", "unacked"), ("PUBLISH", "/0.celeryev/worker.heartbeat", "{}"),
        ("PUBLISH", "op:events:o", "{}"), ("RPUSH", "op:audit", "x"), ("RPUSH", "op:audit:producer", "x"),
        ("LRANGE", "op:audit", "0", "-1"), ("DEL", "op:audit"),
        ("SUBSCRIBE", "op:events:o"), ("LPUSH", "x.celery.pidbox", "x"),
        ("SADD", "_kombu.binding.m.tiny", "x"),
    ],
    "operator": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("role", "command"),
    [(role, command) for role, commands in DENIED.items() for command in commands],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60],
)
def test_a_role_may_not(shipped_servers: Shipped, role: str, command: tuple[str, ...]) -> None:
    with (
        shipped_servers.redis.client(role) as client,
        pytest.raises(NoPermissionError),
    ):
        client.execute_command(*command)


def test_every_role_has_its_line(shipped_servers: Shipped) -> None:
    with shipped_servers.redis.client() as client:
        assert set(client.acl_users()) == {"default", *DENIED}


# Only the ledger's own scripts ---------------------------------------------------------------------


@pytest.fixture
def forgetful(shipped: Shipped) -> Shipped:
    """A server that has just lost its scripts, as in a restart."""
    with shipped.redis.client() as client:
        client.script_flush()
    return shipped


def books(shipped: Shipped, role: str) -> Ledger:
    settings = shipped.settings(role)
    return Ledger.connect(settings.redis_url, settings.ledger())


def submission() -> Submission:
    return Submission(id=uuid4().hex, owner="ann", spec_json="{}", model="tiny", priority=5, title="a job")


def test_a_producer_waits_for_a_worker_to_load_the_scripts(forgetful: Shipped) -> None:
    import threading

    loader = threading.Timer(1.0, books(forgetful, "worker").reap)
    loader.start()
    (submitted,) = books(forgetful, "producer").submit([submission()])
    loader.join()
    assert submitted.created


def test_a_producer_without_scripts_is_told_what_to_start(
    forgetful: Shipped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts, "WAIT_S", 0.5)
    with pytest.raises(LedgerUnreachable, match="lacks the ledger's scripts") as told:
        books(forgetful, "producer").submit([submission()])
    assert "start a worker" in str(told.value.fix)


def test_the_metrics_exporter_loads_the_scripts_where_no_worker_lives(forgetful: Shipped) -> None:
    assert "overpaint_ledger_up 1.0" in exporter.text(books(forgetful, "monitor"))
    assert books(forgetful, "producer").submit([submission()])[0].created
    assert "monitor: evalsha" not in forgetful.redis.denied()


def test_workers_load_the_scripts_of_producers_of_another_version(forgetful: Shipped) -> None:
    other = "return 'of the version before'"
    with forgetful.redis.client() as client:
        sha = client.script_load(other)
        client.hset(scripts.KEPT, sha, other)
        client.hset(scripts.KEPT, "damaged", "this is no Lua")
        client.script_flush()
        books(forgetful, "worker").reap()
        assert client.script_exists(sha) == [True]
    with forgetful.redis.client("producer") as client:
        assert client.evalsha(sha, 0) == "of the version before"


@pytest.mark.parametrize("name", sorted(set(scripts.NAMES) - set(scripts.PRODUCERS)))
def test_a_producer_runs_no_script_of_workers(shipped: Shipped, name: str) -> None:
    owner = books(shipped, "worker")
    owner.reap()
    producer = books(shipped, "producer")
    made = submission()
    producer.submit([made])
    token = owner.claim(made.id, "w1").token
    with shipped.redis.client() as client:
        before = client.hgetall(f"op:job:{made.id}")
        with (
            shipped.redis.client("producer") as stranger,
            pytest.raises(ResponseError, match=r"op:nothing|ermission"),
        ):
            stranger.evalsha(scripts.sha(name), 0, made.id, str(token), *map(str, range(20)))
        assert client.hgetall(f"op:job:{made.id}") == before


# What must work --------------------------------------------------------------------------------------


def test_each_role_does_its_work_and_is_refused_nothing(shipped: Shipped) -> None:
    with shipped.redis.client() as client:
        client.acl_log_reset()
    worker, producer, monitor = (books(shipped, role) for role in ("worker", "producer", "monitor"))
    worker.reap()
    worker.announce(worker_record("w1", "tiny"))
    first, second, third = submission(), submission(), submission()
    with producer.events("ann") as events:
        wakeups = [wakeup for one in producer.submit([first, second, third]) for wakeup in one.wakeups]
        assert wait_until(lambda: events.poll(1.0), what="an event").job_id == first.id
    app = make_app(shipped.redis.url("producer"))
    assert publish(app, wakeups) == 3
    claim = worker.claim(first.id, "w1")
    producer.cancel(first.id)
    producer.cancel(second.id)
    assert {one.state for one in producer.jobs(owner="ann")} == {
        JobState.CANCELLING, JobState.CANCELLED, JobState.QUEUED,
    }  # fmt: skip
    assert producer.job(third.id)
    assert producer.place(producer.jobs(owner="ann", state=JobState.QUEUED)[0])
    assert producer.queues(["tiny"])
    assert [one.id for one in producer.workers()] == ["w1"]
    worker.renew("w1", [])
    token = worker.claim(third.id, "w1").token
    from overpaint_shared.ledger import Failed

    worker.finish(third.id, token, Failed({"code": "x"}))
    producer.replay(third.id)
    assert "overpaint_queue_depth" in exporter.text(monitor)
    worker.retire("w1")
    assert claim.token
    assert shipped.redis.denied() == set()


# Remote control --------------------------------------------------------------------------------------


def control(method: str, **more: Any) -> str:
    """A message of remote control, as kombu writes it."""
    body = {"method": method, "arguments": {}, "destination": None, "pattern": None, "matcher": None} | more
    return envelope(json.dumps(body))


def envelope(body: str) -> str:
    properties = {
        "body_encoding": "base64",
        "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""},
    }
    return json.dumps(
        {
            "body": b64encode(body.encode()).decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"clock": 1, "expires": 0},
            "properties": properties | {"delivery_mode": 1, "delivery_tag": str(uuid4()), "priority": 0},
        }
    )


ORDERS: list[tuple[str, Callable[[str], str]]] = [
    ("revoke", lambda job: control("revoke", arguments={"task_id": job, "terminate": True})),
    ("terminate", lambda job: control("terminate", arguments={"task_id": [job], "signal": "KILL"})),
    ("by header", lambda job: control("revoke_by_stamped_headers", arguments={"headers": {"id": job}})),
    ("hello with revokes", lambda job: control("hello", arguments={"from_node": "x", "revoked": {job: 1}})),
    ("shutdown", lambda _: control("shutdown")),
    ("shutdown for one", lambda _: control("shutdown", pattern="*", matcher="glob")),
    ("pool", lambda _: control("pool_shrink", arguments={"n": 6})),
    ("queue", lambda _: control("cancel_consumer", arguments={"queue": "m.tiny"})),
    ("other queue", lambda _: control("add_consumer", arguments={"queue": "m.other"})),
    (
        "rate",
        lambda _: control("rate_limit", arguments={"task_name": "overpaint.render", "rate_limit": "1/h"}),
    ),
    ("election", lambda _: control("election", arguments={"id": "x", "topic": "task", "action": {}})),
    ("events", lambda _: control("disable_events")),
    ("objects", lambda _: control("objgraph")),
    (
        "answer elsewhere",
        lambda _: control("ping", reply_to={"exchange": "", "routing_key": "op:planted"}, ticket="x"),
    ),
    (
        "answer to events",
        lambda _: control("ping", reply_to={"exchange": "celeryev", "routing_key": "x"}, ticket="x"),
    ),
    ("no command", lambda _: control("nothing")),
    ("number", lambda _: control(7)),  # type: ignore[arg-type]
    ("odd arguments", lambda _: control("ping", arguments=[1])),
    ("odd destination", lambda _: control("ping", destination=5)),
    ("odd pattern", lambda _: control("ping", pattern="(", matcher="pcre")),
    (
        "endless pattern",
        lambda _: control("ping", pattern="(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*!", matcher="pcre"),
    ),
    ("odd clock", lambda _: control("ping").replace('"clock": 1', '"clock": "x"')),
    ("unknown matcher", lambda _: control("ping", pattern="x", matcher="y")),
    ("list body", lambda _: envelope("[1]")),
    ("no JSON body", lambda _: envelope("{")),
    ("no JSON", lambda _: "{"),
    ("list", lambda _: "[]"),
    ("text", lambda _: '"x"'),
    ("empty", lambda _: "{}"),
    ("deep", lambda _: "[" * 100_000),
    ("bytes", lambda _: "\udcff"),
    ("no properties", lambda _: json.dumps({"body": "", "properties": None})),
    (
        "odd properties",
        lambda _: json.dumps({"body": "x", "properties": {"delivery_tag": [], "delivery_info": 5}}),
    ),
    ("bad base64", lambda _: envelope("x").replace('"body": "', '"body": "*')),
    (
        "unknown encoding",
        lambda _: envelope("{}").replace("application/json", "application/x-python-serialize"),
    ),
]


def test_monitor_can_neither_stop_a_worker_nor_a_job_nor_write_through_one(shipped_farm: ShippedFarm) -> None:
    worker = shipped_farm.start().ready()
    (job_id,) = shipped_farm.submit(shipped_farm.long())
    shipped_farm.stepping(job_id)
    server = shipped_farm.on.redis
    # Who asks is put into a table, which names the queue for the answer: here another one.
    oid = str(uuid4())
    with server.client("monitor") as monitor, server.client() as operator:
        table = "_kombu.binding.reply.celery.pidbox"
        monitor.sadd(table, f"{oid}\x06\x16\x06\x16op:planted")
        answer = {"exchange": "reply.celery.pidbox", "routing_key": oid}
        for name, order in [*ORDERS, ("planted", lambda _: control("ping", reply_to=answer, ticket="x"))]:
            told = monitor.publish("/0.celery.pidbox", order(job_id).encode(errors="surrogateescape"))
            assert told == 1, f"the worker no longer listens after {name}"
        (pong,) = make_app(server.url("operator")).control.ping(timeout=10, limit=1)
        assert list(pong.values()) == [{"ok": "pong"}]
        assert operator.exists("op:planted") == 0
    assert worker.popen.poll() is None
    assert shipped_farm.job(job_id).state is JobState.RUNNING
    assert worker.said("control.refused")
    (other,) = shipped_farm.submit(shipped_farm.spec())
    shipped_farm.until(other, JobState.DONE)
    assert shipped_farm.job(job_id).state is JobState.RUNNING
    assert not worker.said("job.revoked")


def test_a_producer_cannot_take_more_than_its_part_of_the_servers_memory(shipped: Shipped) -> None:
    with shipped.redis.client() as operator, shipped.redis.client("producer") as producer:
        with pytest.raises((redis.ConnectionError, ResponseError)):
            producer.set("op:spec:big", "x" * (9 << 20))
        with pytest.raises((redis.ConnectionError, ResponseError)):
            producer.lpush("m.tiny", "x" * (100 << 20))
        assert operator.exists("op:spec:big", "m.tiny") == 0


@pytest.mark.parametrize("word", ["", "nan", "inf", "-1", "1e308", "9" * 400, "[" * 5000, "j"])
@pytest.mark.parametrize("name", scripts.PRODUCERS)
def test_a_producers_script_ends_soon_whatever_it_is_given(shipped: Shipped, name: str, word: str) -> None:
    books(shipped, "worker").reap()
    books(shipped, "producer").submit([submission() for _ in range(20)])
    with shipped.redis.client("producer", socket_timeout=3) as stranger, suppress(ResponseError):
        stranger.evalsha(scripts.sha(name), 0, *[word] * 20)
    assert books(shipped, "producer").submit([submission()])[0].created


def test_answers_that_nobody_reads_do_not_fill_the_server(shipped: Shipped) -> None:
    with shipped.redis.client("producer") as producer, shipped.redis.client() as operator:
        producer.set("op:spec:big", "x" * (7 << 20))
        operator.config_resetstat()
        with socket.create_connection(("127.0.0.1", shipped.redis.port)) as raw:
            raw.settimeout(30)
            raw.sendall(f"AUTH producer {shipped.redis.password('producer')}\r\n".encode())
            raw.sendall(b"GET op:spec:big\r\n" * 200)
            address = "{}:{}".format(*raw.getsockname())
            wait_until(lambda: address not in addresses(operator), what="the greedy client is disconnected")
        assert operator.info("memory")["used_memory_peak"] < 400 << 20
        assert producer.ping()


def addresses(client: "redis.Redis") -> set[str]:
    """Where clients connect from."""
    return {one["addr"] for one in client.client_list()}


def test_settings_name_each_role(shipped: Shipped) -> None:
    for role in DENIED:
        assert role in Settings.load(redis_url=shipped.redis.url(role)).redis_url.shown
