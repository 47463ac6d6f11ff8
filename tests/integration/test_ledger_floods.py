"""What producers write by hand does not keep Redis busy, stop recovery, or block an owner for good."""

import time
from pathlib import Path

import pytest
import redis
from redis.exceptions import ResponseError

from overpaint_producer.services import start_redis
from overpaint_shared.ledger import Ledger
from overpaint_shared.ledger.scripts import REMEMBERED_S, Scripts
from overpaint_shared.queues import list_name
from tests.integration.ledgers import Books, job, ledger, names, reaper

SHA256 = "a" * 64
FAR = "99999999999"
MOST_WOKEN = 2048


def reap(redis_url: str, rounds: int = 4) -> None:
    books = reaper(redis_url, reap_s=0.0)
    for _ in range(rounds):
        books.reap()


def call(client: redis.Redis, name: str, *args: object) -> list[object]:
    reply: list[object] = Scripts(client).run(name, *args)
    return reply


# One call ------------------------------------------------------------------------------------------


def test_a_submit_that_names_too_many_inputs_is_refused_before_any_is_looked_at(
    redis_client: redis.Redis,
) -> None:
    fields = ["j", "ann", 64, "", "d", "{}", "sd15", 5, "t", "", "", "", "a," * 200_000, "1", ""]
    with pytest.raises(ResponseError, match="too many inputs"):
        call(redis_client, "submit", *fields)


def test_of_inputs_only_those_that_can_be_some_are_looked_up(redis_client: redis.Redis) -> None:
    fields = ["j", "ann", 64, "", "d", "{}", "sd15", 5, "t", "", "", "", f"a,b,{SHA256}", "1", ""]
    assert call(redis_client, "submit", *fields) == [b"gone", b"j", [SHA256.encode()]]


def test_an_input_to_condemn_must_be_one(redis_client: redis.Redis) -> None:
    with pytest.raises(ResponseError, match="no SHA-256"):
        call(redis_client, "condemn", "ann", "a" * 100_000 + "b", 0, 50)


def test_to_condemn_an_input_reads_few_specs_whatever_the_caller_says(
    books: Ledger, redis_client: redis.Redis
) -> None:
    books.submit([job(str(number)) for number in range(60)])
    assert call(redis_client, "condemn", "ann", SHA256, 0, 1e9)[0] == b"unread"


def test_an_input_counts_as_named_by_a_spec_that_is_too_long_to_search(
    books: Ledger, redis_client: redis.Redis
) -> None:
    books.submit([job("a", spec_json="x" * 1_100_000)])
    assert call(redis_client, "condemn", "ann", SHA256, 0, 50)[0] == b"named"


def test_one_call_wakes_a_bounded_number_of_jobs(redis_url: str, redis_client: redis.Redis) -> None:
    ledger(redis_url, window=1).submit([job(str(number)) for number in range(MOST_WOKEN + 100)])
    _, woken, *_ = call(redis_client, "cancel", "{}", "1e308", 60, "1", 1, "3:sd15:ann")
    assert isinstance(woken, list)
    assert len(woken) // 6 == MOST_WOKEN
    reap(redis_url, 1)
    assert redis_client.zcard("op:wait:3:sd15:ann") > 0, "its places are taken"


def test_ended_deletions_are_forgotten_though_others_follow(redis_client: redis.Redis) -> None:
    redis_client.zadd("op:condemned:ann", {"b" * 64: time.time() - REMEMBERED_S - 60, "c" * 64: time.time()})
    assert call(redis_client, "condemn", "ann", SHA256, 0, 50)[0] == b"condemned"
    assert set(redis_client.zrange("op:condemned:ann", 0, -1)) == {SHA256.encode(), b"c" * 64}


# Recovery ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [-1, 0])
def test_lanes_of_nobody_do_not_keep_the_reaper_from_the_others(
    books: Ledger, redis_url: str, redis_client: redis.Redis, score: int
) -> None:
    books.submit([job("a")])
    redis_client.zadd("op:lanes", {f"0:e{number}:x": score for number in range(300)})
    found = reaper(redis_url).reap()
    assert (found.stale, names(found.wakeups)) == (("a",), ["a"])
    assert redis_client.zrange("op:lanes", 0, -1) == [b"3:sd15:ann"]


def test_more_lanes_of_nobody_than_one_round_looks_at_do_not_keep_it_from_the_others(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    books.submit([job("a")])
    redis_client.zadd("op:lanes", {f"0:e{number}:x": -1 for number in range(5000)})
    assert reaper(redis_url).reap().stale == ("a",)
    reap(redis_url, 1)
    assert redis_client.zrange("op:lanes", 0, -1) == [b"3:sd15:ann"]


def test_lanes_of_nobody_beside_a_queue_with_messages_are_no_work(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    books.submit([job("a")])
    redis_client.lpush(list_name("sd15", 3), *["{}"] * 100)
    redis_client.zadd("op:lanes", {f"3:sd15:x{number}": -1 for number in range(300)})
    assert reaper(redis_url).reap().stale == ("a",)


def test_the_lane_of_a_queued_job_is_visited_before_many_that_seem_to_have_work(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    books.submit([job("a")])
    for number in range(200):
        redis_client.zadd(f"op:wait:0:e{number}:x", {"nobody": 1})
        redis_client.zadd("op:lanes", {f"0:e{number}:x": -1})
    assert reaper(redis_url).reap().stale == ("a",)


def test_deadlines_of_nobody_do_not_keep_an_overdue_job_waiting(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    books.submit([job("a", deadline_s=60)])
    redis_client.hset("op:job:a", "deadline", "2")
    redis_client.zadd("op:deadlines", {"a": 2} | {f"e{number}": 1 for number in range(3000)})
    assert reaper(redis_url).reap().late == ("a",)
    assert redis_client.zcard("op:deadlines") == 0


def test_ends_of_keeping_of_nobody_do_not_keep_records_longer(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    books.submit([job("a")])
    books.cancel("a")
    redis_client.zadd("op:expiry", {"a": 2} | {f"e{number}": 1 for number in range(3000)})
    reap(redis_url, 1)
    assert redis_client.exists("op:job:a", "op:expiry") == 0


def test_long_items_of_a_queue_are_not_read_at_once(tmp_path: Path) -> None:
    server = start_redis(tmp_path)  # one of its own: nothing resets the highest memory that a server ever had
    try:
        books = reaper(server.url)
        books.submit([job("a")])
        books.reap()  # the scripts are loaded
        with redis.Redis.from_url(server.url) as client:
            for _ in range(80):
                client.lpush(list_name("sd15", 3), "x" * (1 << 20))
            before = client.info("memory")["used_memory"]
            reaper(server.url, reap_s=0.0).reap()
            assert client.info("memory")["used_memory_peak"] - before < 40 << 20
            assert client.llen(list_name("sd15", 3)) == 80
    finally:
        server.stop()


# Counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [200, 11_000])
@pytest.mark.parametrize("state", ["queued", "running", "done"])
def test_a_flooded_census_is_counted_anew(
    books: Ledger, redis_url: str, redis_client: redis.Redis, state: str, kinds: int
) -> None:
    books.submit([job("a"), job("b", model="sdxl", features=frozenset({"method:x"}))])
    books.cancel("a")
    redis_client.hset("op:census", mapping={f"{state}|e{number}|": 1 for number in range(kinds)})
    reap(redis_url, 1)
    assert redis_client.hgetall("op:census") == {b"cancelled|sd15|": b"1", b"queued|sdxl|x": b"1"}
    Books(redis_client).check(window=64)


def test_a_flood_of_moves_goes(books: Ledger, redis_url: str, redis_client: redis.Redis) -> None:
    redis_client.hset("op:moves", mapping={f"queued|e{number}|": 1 for number in range(11_000)})
    reap(redis_url, 1)
    assert redis_client.hlen("op:moves") == 0


def test_a_long_kind_leaves_the_census(books: Ledger, redis_url: str, redis_client: redis.Redis) -> None:
    redis_client.hset("op:moves", f"queued|{'e' * 1000}|", 1)
    reap(redis_url, 1)
    assert redis_client.hlen("op:moves") == 0


def test_of_many_models_some_are_looked_at_in_each_round(books: Ledger, redis_client: redis.Redis) -> None:
    models = [f"e{number}" for number in range(100)]
    books.submit([job(model, model=model) for model in models])
    for model in models:
        redis_client.zadd(f"op:queued:{model}", {"nobody": 1})
    left = []
    for _ in range(4):
        call(redis_client, "scrub", 0, 60, 60, 32)
        left.append(sum(redis_client.zscore(f"op:queued:{model}", "nobody") is not None for model in models))
    assert left == [68, 36, 4, 0]


@pytest.mark.parametrize("also", [False, True], ids=["the owner's only job", "beside another"])
def test_a_lost_record_leaves_no_count(
    books: Ledger, redis_url: str, redis_client: redis.Redis, also: bool
) -> None:
    books.submit([job("b"), *([job("a")] if also else [])])
    redis_client.delete("op:job:b")
    reap(redis_url)
    redis_client.hdel("op:scrub", "counted")  # a minute later
    reap(redis_url)
    now = Books(redis_client)
    assert now.used == ({"ann": {"queued": 1, "bytes": len(job("a").spec_json)}} if also else {})
    assert now.census == ({"queued|sd15|": 1} if also else {})


def test_a_rate_that_was_written_by_hand_stops_nobody_for_good(
    books: Ledger, redis_client: redis.Redis
) -> None:
    redis_client.set("op:rate:ann", f"0 {FAR}")
    assert books.submit([job("a")])[0].created
    assert redis_client.ttl("op:rate:ann") > 0


@pytest.mark.parametrize("field", ["queued", "bytes"])
def test_a_use_that_was_written_by_hand_stops_nobody_for_good(
    books: Ledger, redis_url: str, redis_client: redis.Redis, field: str
) -> None:
    redis_client.hincrby("op:used:ann", field, 10**12)
    assert books.submit([job("a")])[0].created
    Books(redis_client).check(window=64)
    redis_client.hincrby("op:used:ann", field, 10**12)
    reap(redis_url)
    assert books.submit([job("b")])[0].created
    Books(redis_client).check(window=64)


def test_a_limit_is_told_with_the_jobs_that_wait(books: Ledger, redis_client: redis.Redis) -> None:
    redis_client.hset("op:limits", "max_queued", 2)
    books.submit([job("a")])
    redis_client.hset("op:used:ann", "queued", 50)
    assert books.submit([job("b")])[0].created
