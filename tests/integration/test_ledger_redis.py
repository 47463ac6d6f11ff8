"""A Redis that forgets, is full, takes no writes, is a cluster, or is not there."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from overpaint_producer.children import guarded
from overpaint_producer.services import find_redis, free_ports, start_redis
from overpaint_shared.errors import (
    LedgerFull,
    LedgerUnreachable,
)
from overpaint_shared.ledger import (
    Beat,
    Done,
    JobState,
    Ledger,
    ReleaseReason,
)
from overpaint_shared.setting_views import LedgerSettings
from tests.integration.ledgers import collect, job, ledger, worker
from tests.waiting import wait_until


def test_scripts_that_redis_has_forgotten_are_sent_again(books: Ledger, redis_client: redis.Redis):
    books.submit([job("a")])
    redis_client.script_flush()
    assert books.claim("a", "w1").verdict == "ok"
    redis_client.script_flush()
    assert len(books.submit([job("b"), job("c")])) == 2


def test_a_follower_hears_again_after_redis_restarted(tmp_path: Path):
    server = start_redis(tmp_path)
    try:
        books = ledger(server.url)
        with books.events("ann") as events:
            server.kill()
            with pytest.raises(LedgerUnreachable):
                events.poll(1.0)
            server = start_redis(tmp_path)
            events.poll(0.0)
            with redis.Redis.from_url(server.url) as client:
                wait_until(lambda: client.pubsub_numsub("op:events:ann")[0][1], what="it listens again")
            books.submit([job("a")])
            assert [event.job_id for event in collect(events, JobState.QUEUED)] == ["a"]
    finally:
        server.stop()


def test_a_redis_that_is_not_there_is_a_typed_error_without_the_password():
    away = Ledger.connect("redis://user:secret@127.0.0.1:1/0", LedgerSettings())
    assert "secret" not in repr(away)
    with pytest.raises(LedgerUnreachable) as caught:
        away.depth()
    assert "127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.fix


def test_a_wrong_password_says_so(redis_server):
    host = redis_server.url.rsplit("@", 1)[-1].removeprefix("redis://")
    with pytest.raises(LedgerUnreachable, match="password"):
        Ledger.connect(f"redis://:wrong@{host}", LedgerSettings()).depth()


def test_a_client_that_does_not_decode_is_refused(redis_client: redis.Redis):
    with pytest.raises(ValueError, match="decode_responses"):
        Ledger(redis_client, LedgerSettings())


# A full Redis ------------------------------------------------------------


def test_a_full_redis_refuses_jobs_by_name_and_still_ends_those_it_has(
    books: Ledger, redis_client: redis.Redis
):
    books.submit([job("a"), job("b")])
    token = books.claim("a", "w1").token
    redis_client.config_set("maxmemory", "1")
    try:
        with pytest.raises(LedgerFull, match="maxmemory"):
            books.submit([job("c")])
        assert books.renew("w1", [Beat("a", token, "denoise", 1, 2)]) == {"a": "ok"}
        assert books.finish("a", token, Done({"image.png": "k"})).accepted
        token = books.claim("b", "w1").token
        assert books.release("b", token, ReleaseReason.CRASHED).state is JobState.QUEUED
        assert books.cancel("b").state is JobState.CANCELLED
        books.announce(worker("w1"))
    finally:
        redis_client.config_set("maxmemory", "0")
    assert books.job("c") is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("REPLICAOF 127.0.0.1 1", "read-only replica"),
        ("CONFIG SET min-replicas-to-write 1", "takes no writes"),
    ],
    ids=["it became a replica", "it misses its replicas"],
)
def test_a_redis_that_takes_no_writes_counts_as_away(tmp_path: Path, command: str, words: str):
    service = start_redis(tmp_path)
    try:
        books = ledger(service.url)
        books.submit([job("a")])
        token = books.claim("a", "w1").token
        with redis.Redis.from_url(service.url) as client:
            client.execute_command(*command.split())
        for call in (
            lambda: books.renew("w1", [Beat("a", token)]),
            lambda: books.finish("a", token, Done({})),
            lambda: books.submit([job("b")]),
        ):
            with pytest.raises(LedgerUnreachable, match=words):
                call()
    finally:
        service.stop()


def test_a_redis_cluster_is_refused_by_name(tmp_path: Path):
    # A cluster's members also talk on this port plus 10,000, and Redis does not start where there is none.
    port = next(port for port in free_ports(64) if port < 55_000)
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--cluster-enabled", "yes"]
    with subprocess.Popen(guarded([find_redis(), *options]), stdout=subprocess.DEVNULL) as server:
        try:
            books = ledger(f"redis://127.0.0.1:{port}/0")
            error = wait_until(lambda: _refusal(books.ping, "Cluster"), what="the cluster answers")
            assert "one Redis primary" in str(error)
            assert _refusal(lambda: books.submit([job("a")]), "Cluster")
        finally:
            server.terminate()


def _refusal(call: Callable[[], object], word: str) -> LedgerUnreachable | None:
    """The error that `call` raises, once it says `word`."""
    try:
        call()
    except LedgerUnreachable as error:
        return error if word in str(error) else None
    return None
