"""Whatever is planted in Redis, recovery, submits, listings and metrics go on for the jobs beside it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import redis

from overpaint_producer import exporter
from overpaint_shared.errors import DamagedRecord
from overpaint_shared.ledger import Beat, Done, JobState, Ledger, Reaped
from overpaint_shared.queues import list_name
from tests.integration.ledgers import Books, expire_lease, job, ledger, names, reaper, running, states, worker

LANE = "3:sd15:ann"
FAR = 9e15


@dataclass(frozen=True)
class Plant:
    """An entry that does not belong, and how to see that it has gone."""

    name: str
    plant: Callable[[redis.Redis], Any]
    gone: Callable[[redis.Redis], bool]


def member(index: str, score: float = 1.0, name: str = "done") -> Plant:
    """The id of a job in an index where it does not belong."""
    return Plant(
        f"{name} in {index}",
        lambda client: client.zadd(index, {name: score}),
        lambda client: client.zscore(index, name) is None,
    )


def wrong_type(key: str) -> Plant:
    """A key of another type."""

    def plant(client: redis.Redis) -> None:
        client.delete(key)
        client.set(key, "x")

    return Plant(f"{key} is a string", plant, lambda client: client.type(key) != b"string")


def field(name: str, value: str | bytes | None) -> Plant:
    """A queued job's record with one odd field."""

    def plant(client: redis.Redis) -> None:
        if value is None:
            client.hdel("op:job:odd", name)
        else:
            client.hset("op:job:odd", name, value)

    def gone(client: redis.Redis) -> bool:
        return all(client.zscore(key, "odd") is None for key in client.keys("op:*") if _is_index(client, key))

    shown = value if value is None or len(value) < 20 else value[:10] + "..."
    return Plant(f"{name} of a record is {shown!r}", plant, gone)


def _is_index(client: redis.Redis, key: bytes) -> bool:
    """All but the one of what expires, and of a group, which nobody finds without the owner."""
    return not key.startswith((b"op:expiry", b"op:group:")) and client.type(key) == b"zset"


def counter(key: str, name: str, value: str = "1") -> Plant:
    return Plant(
        f"{key} {name!r} is {value!r}",
        lambda client: client.hset(key, name, value),
        lambda client: client.hget(key, name) != value.encode(),
    )


def worker_record(text: str) -> Plant:
    def plant(client: redis.Redis) -> None:
        client.sadd("op:workers", "odd")
        client.hset("op:worker:odd", "record", text)

    return Plant(
        f"a worker's record is {text[:60]}", plant, lambda client: not client.sismember("op:workers", "odd")
    )


def ended_by_hand(client: redis.Redis) -> None:
    client.hset("op:job:odd", "state", "done")


def stands_with_the_done(client: redis.Redis) -> bool:
    wrong = [key for key in client.keys("op:*") if key.startswith((b"op:sent", b"op:wait", b"op:queued"))]
    return (
        all(client.zscore(key, "odd") is None for key in [*wrong, "op:state:queued"])
        and client.zscore("op:state:done", "odd") is not None
    )


RECORD = {"id": "odd", "name": "n", "host": "h", "device": "cpu", "slots": 1, "version": "1"}
PLANTS = [
    Plant("a queued job's record says done", ended_by_hand, stands_with_the_done),
    member("op:leases"),
    member("op:leases", FAR),
    member("op:leases", name="nobody"),
    member("op:leases", name="odd"),
    member("op:leases", name="x" * 5000),
    member("op:expiry", name="odd"),
    member("op:expiry", name="nobody"),
    member(f"op:sent:{LANE}"),
    member(f"op:sent:{LANE}", name="elsewhere"),
    member(f"op:wait:{LANE}"),
    member(f"op:wait:{LANE}", name="nobody"),
    member("op:queued:sd15"),
    member("op:queued:sd15", name="elsewhere"),
    member("op:state:running"),
    member("op:state:queued"),
    member("op:state:cancelling", name="nobody"),
    member("op:lanes", name="no lane"),
    member("op:lanes", name="3:sd15"),
    member("op:lanes", name="7:sd15:ann"),
    member("op:lanes", name="3::ann"),
    member("op:lanes", FAR, name=""),
    *(
        wrong_type(key)
        for key in (
            "op:job:odd", "op:leases", "op:lanes", "op:expiry", "op:census", "op:moves", "op:unserved",
            "op:workers", "op:worker:w1", "op:pace:since", "op:scrub", "op:owner:ann", "op:group:ann:g",
            f"op:sent:{LANE}", f"op:wait:{LANE}", "op:queued:sd15", "op:tokens:ann",
            *(f"op:state:{state}" for state in JobState),
        )
    ),
    *(
        field(name, value)
        for name, value in (
            ("state", "asleep"), ("state", None), ("owner", None), ("owner", "a b"), ("model", None),
            ("model", "a:b"), ("model", "m" * 99), ("class", "4"), ("class", None), ("priority", "high"),
            ("priority", None), ("created", "yesterday"), ("created", None), ("created", "nan"),
            ("created", "1e999"), ("since", "0x10"), ("since", None), ("attempt", "many"),
            ("crashes", "-"), ("lost", "1.5"), ("lost", "9" * 30), ("token", "t"), ("unable_since", "x"),
            ("title", "x" * 2_000_000), ("owner", b"\xff\xfe\x00"),
        )
    ),
    counter("op:census", "no bars"),
    counter("op:census", "asleep|sd15|"),
    counter("op:census", "queued|sd15|", "many"),
    counter("op:census", "a|b|c|d"),
    counter("op:moves", "queued|sd15|", "9" * 30),
    counter("op:pace:since", "sd15", "never"),
    counter("op:unserved", "sdxl", "now then"),
    *(
        worker_record(json.dumps(record))
        for record in (
            {}, [], 5, None, RECORD | {"id": "other"}, RECORD | {"slots": "four"}, RECORD | {"name": None},
            RECORD | {"catalogue": ["x"]}, RECORD | {"features": [1]}, RECORD | {"models": 5},
            RECORD | {"catalogue": None}, RECORD | {"steps_per_s": "fast"},
        )
    ),
    worker_record("no JSON"),
    worker_record("[" * 100_000),
]  # fmt: skip


@pytest.fixture
def farm(redis_url: str, redis_client: redis.Redis) -> Ledger:
    """A job in each place, one of which will be odd, and one whose worker is lost."""
    books = ledger(redis_url)
    books.announce(worker("w1", "sd15", "other"))
    running(books, "done")
    books.finish("done", books.job("done").token, Done({}))
    books.submit([job("elsewhere", model="other"), job("odd", group="g", token="t")])
    running(books, "lost")
    expire_lease(redis_client, "lost")
    books.submit([job("good")])
    return books


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name[:80])
def test_an_odd_entry_is_put_aside_and_told_and_the_others_go_on(
    farm: Ledger, redis_url: str, redis_client: redis.Redis, plant: Plant
) -> None:
    plant.plant(redis_client)
    assert farm.jobs() is not None
    exporter.text(farm)
    rounds = mend(redis_url)
    assert any(each.odd for each in rounds), "it is told"
    reasons = [json.loads(entry)["reason"] for entry in redis_client.lrange("op:quarantine", 0, -1)]
    assert reasons, "it is put aside"
    assert plant.gone(redis_client)
    assert not any(each.odd for each in mend(redis_url)), "it is told once"
    assert_the_others_go_on(farm, redis_client)


def mend(redis_url: str) -> list[Reaped]:
    books = reaper(redis_url, reap_s=0.0)
    return [books.reap() for _ in range(2)]


def assert_the_others_go_on(books: Ledger, client: redis.Redis) -> None:
    assert states(books, "lost", "good") == [JobState.QUEUED, JobState.QUEUED]
    books.announce(worker("w1", "sd15", "other"))
    for name in ("good", "lost"):
        claim = books.claim(name, "w1")
        assert claim.verdict == "ok"
        assert books.renew("w1", [Beat(name, claim.token, "denoise", 1, 2)]) == {name: "ok"}
        assert books.finish(name, claim.token, Done({})).accepted
    (new,) = books.submit([job("new", group="g", token="t-new")])
    assert new.created
    assert {"good", "lost", "new"} <= {record.id for record in books.jobs(owner="ann")}
    assert "new" in {record.id for record in books.jobs(owner="ann", group="g")}
    assert [each.id for each in books.workers()] == ["w1"]
    assert books.oldest_waiting("sd15") < 600
    assert "overpaint_workers 1.0" in exporter.text(books)
    Books(client, odd=True).check(window=64)


def test_a_job_in_a_queue_of_another_type_is_woken_again(
    farm: Ledger, redis_url: str, redis_client: redis.Redis
):
    redis_client.set(list_name("sd15", 5), "x")
    assert any(each.odd for each in mend(redis_url))
    assert not redis_client.exists(list_name("sd15", 5))


def test_a_token_counter_out_of_range_does_not_stop_claims(books: Ledger, redis_client: redis.Redis):
    for planted in ("x", "9223372036854775807", "9223372036854770000"):
        name = f"j{planted[-3:]}"
        books.submit([job(name), job(name + "b")])
        redis_client.set("op:token", planted)
        first, second = books.claim(name, "w1"), books.claim(name + "b", "w1")
        assert (first.verdict, second.verdict) == ("ok", "ok")
        assert 1e15 < first.token < second.token < 1e16


def test_a_batch_goes_on_beside_an_odd_record(books: Ledger, redis_client: redis.Redis):
    tokens = {name: running(books, name) for name in "abc"}
    redis_client.delete("op:job:b")
    redis_client.set("op:job:b", "x")
    verdicts = books.renew("w1", [Beat(name, token) for name, token in tokens.items()])
    assert verdicts == {"a": "ok", "b": "lost", "c": "ok"}
    assert set(books.records("abc")) == {"a", "c"}


def test_a_job_whose_spec_is_gone_fails_with_a_word_of_it(books: Ledger, redis_client: redis.Redis):
    books.submit([job("a")])
    redis_client.delete("op:spec:a")
    assert books.claim("a", "w1").verdict == "skip"
    record = books.job("a")
    assert record is not None
    assert (record.state, record.error["code"]) == (JobState.FAILED, "damaged_record")


def test_a_job_that_fails_in_a_claim_gives_its_place_to_the_next(redis_url: str, redis_client: redis.Redis):
    books = ledger(redis_url, window=1)
    books.submit([job("a"), job("b")])
    redis_client.delete("op:spec:a")
    assert names(books.claim("a", "w1").wakeups) == ["b"]


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"a":' * 100_000, '{"a":' * 500 + "1" + "}" * 500])
def test_a_damaged_spec_or_result_is_shown_as_none(text: str, books: Ledger, redis_client: redis.Redis):
    books.submit([job("a"), job("b")])
    redis_client.set("op:spec:a", text)
    redis_client.hset("op:job:a", mapping=dict.fromkeys(("result", "error", "labels"), text))
    shown = [json.loads(json.dumps(each.to_json())) for each in books.records("ab", specs=True).values()]
    assert [each["id"] for each in shown] == ["a", "b"]
    assert {shown[0][name] for name in ("spec", "result", "error")} == {None}
    assert shown[0]["labels"] == {}


@pytest.mark.parametrize("files", [None, 1, "x", ["a"], {"image.png": 1}])
def test_a_result_with_damaged_files_has_none(files: object, books: Ledger, redis_client: redis.Redis):
    books.submit([job("a")])
    redis_client.hset("op:job:a", "result", json.dumps({"files": files}))
    record = books.job("a")
    assert record is not None
    assert record.files == {}


def test_a_damaged_record_is_told_to_who_asks_for_it(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    books.submit([job("a")])
    redis_client.hset("op:job:a", "class", "4")
    mend(redis_url)
    with pytest.raises(DamagedRecord, match="its class is 4"):
        books.job("a")
    assert books.jobs() == []


def test_an_index_that_lost_its_entries_has_them_again(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    books.submit([job("waits"), job("ends")])
    running(books, "runs")
    books.finish("ends", books.claim("ends", "w1").token, Done({}))
    redis_client.delete(
        "op:leases", "op:lanes", f"op:sent:{LANE}", "op:queued:sd15", "op:owner:ann", "op:expiry"
    )
    rounds = mend(redis_url)
    assert any(each.mended for each in rounds)
    Books(redis_client).check(window=64)
    assert states(books, "waits", "ends") == [JobState.QUEUED, JobState.DONE]


def test_what_is_put_aside_is_bounded(books: Ledger, redis_url: str, redis_client: redis.Redis):
    redis_client.zadd("op:lanes", {f"no lane {number}": 0 for number in range(300)})
    for _ in range(6):
        mend(redis_url)
    assert redis_client.llen("op:quarantine") == 100
    assert not redis_client.exists("op:lanes")


def test_an_event_that_is_none_is_passed_over(books: Ledger, redis_client: redis.Redis):
    with books.events("ann") as events:
        for text in (
            "no JSON",
            "[]",
            "{}",
            '{"job":"a","state":"asleep"}',
            '{"job":"a","state":"done","at":"x"}',
        ):
            redis_client.publish("op:events:ann", text)
            assert events.poll(5.0) is None
        books.submit([job("a")])
        assert events.poll(5.0) is not None
