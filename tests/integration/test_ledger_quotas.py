"""What an owner may have waiting and submit; the limits are in Redis, and a producer cannot write them."""

import pytest
import redis

from overpaint_shared.ledger import Done, JobState, Ledger, QuotaExceeded, ReleaseReason
from overpaint_shared.ledger.scripts import BURST_S
from tests.integration.ledgers import Books, job, reaper, running, states


def refused(books: Ledger, *job_ids: str, **values: object) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as caught:
        books.submit([job(job_id, **values) for job_id in job_ids])
    return caught.value


def limit(client: redis.Redis, owner: str | None = None, **values: int) -> None:
    client.hset("op:limits" if owner is None else f"op:limits:{owner}", mapping=values)


def test_an_owner_has_at_most_so_many_jobs_waiting_and_the_rest_is_submitted(
    books: Ledger, redis_client: redis.Redis
) -> None:
    limit(redis_client, max_queued=2)
    error = refused(books, "a", "b", "c", "d")
    assert [answer.id for answer in error.submitted] == ["a", "b"]
    assert error.refused == {"c", "d"}
    assert (error.field, error.value) == ("max_queued", 2)
    assert str(error).startswith(
        "max_queued: owner ann has 2 jobs waiting, and may have 2 (try again when some"
    )
    assert books.submit([job("e", owner="bob")])[0].created, "another owner has a limit of his own"
    Books(redis_client).check(window=64)


def test_a_place_is_free_again_when_a_job_starts_and_taken_when_it_comes_back(
    books: Ledger, redis_client: redis.Redis
) -> None:
    limit(redis_client, max_queued=1)
    token = running(books)
    books.submit([job("b")])
    refused(books, "c")
    books.release("a", token, ReleaseReason.STOPPED)
    books.cancel("b")
    refused(books, "c")
    books.finish("a", books.claim("a", "w1").token, Done({}))
    assert books.submit([job("c")])[0].created
    Books(redis_client).check(window=64)


def test_a_submit_that_is_there_does_not_count(books: Ledger, redis_client: redis.Redis) -> None:
    limit(redis_client, max_queued=1)
    books.submit([job("a", token="t")])
    (again,) = books.submit([job("b", token="t")])
    assert (again.id, again.created) == ("a", False)


def test_the_bytes_of_waiting_specs_are_bounded(books: Ledger, redis_client: redis.Redis) -> None:
    limit(redis_client, max_spec_bytes=1000)
    books.submit([job("a", spec_json="x" * 600)])
    error = refused(books, "b", spec_json="x" * 600)
    assert str(error).startswith("max_spec_bytes: the waiting jobs of owner ann take 600 bytes of 1000")
    assert books.submit([job("c", spec_json="x" * 400)])[0].created


def test_a_spec_that_is_too_large_alone_is_not_told_to_wait(books: Ledger, redis_client: redis.Redis) -> None:
    limit(redis_client, max_spec_bytes=100)
    told = str(refused(books, "a", spec_json="ü" * 60))
    assert told.startswith("max_spec_bytes: this job alone has 120 bytes, more than the 100 that")
    assert told.endswith("(make it smaller, or ask the operator to raise the limit: overpaint quota)")
    books.submit([job("b", spec_json="x" * 90)])
    assert "this job alone has 120 bytes" in str(refused(books, "c", spec_json="x" * 120))
    assert "try again when some of them have started" in str(refused(books, "d", spec_json="x" * 90))


def test_an_owners_own_limit_wins_and_nought_is_none(books: Ledger, redis_client: redis.Redis) -> None:
    limit(redis_client, max_queued=1)
    limit(redis_client, "ann", max_queued=0)
    assert len(books.submit([job(name) for name in "abc"])) == 3
    limit(redis_client, "ann", max_queued=3)
    refused(books, "d")


def test_a_limit_that_is_no_number_is_as_if_it_were_not_there(
    books: Ledger, redis_client: redis.Redis
) -> None:
    redis_client.hset("op:limits", "max_queued", "many")
    assert books.submit([job("a")])[0].created


def test_submits_a_second_are_bounded_and_come_back_with_time(
    books: Ledger, redis_client: redis.Redis
) -> None:
    limit(redis_client, submits_per_s=1)
    many = [f"j{number}" for number in range(BURST_S + 3)]
    error = refused(books, *many)
    assert len(error.submitted) == BURST_S
    assert 0 < error.wait_s <= 1
    left, at = redis_client.get("op:rate:ann").decode().split()
    redis_client.set("op:rate:ann", f"{left} {float(at) - 2}")  # two seconds pass
    error = refused(books, *many[BURST_S:])
    assert len(error.submitted) == 2


def test_a_record_from_before_there_were_limits_is_never_counted_out(
    books: Ledger, redis_client: redis.Redis
) -> None:
    books.submit([job("old"), job("new")])
    redis_client.hdel("op:job:old", "bytes")
    redis_client.hset("op:used:ann", mapping={"queued": 1, "bytes": 13})
    token = books.claim("old", "w1").token
    assert redis_client.hget("op:used:ann", "queued") == b"1"
    books.release("old", token, ReleaseReason.STOPPED)
    Books(redis_client).check(window=64)


def test_a_replay_counts_and_a_job_put_aside_does_not(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    books.submit([job("a"), job("odd")])
    books.cancel("a")
    redis_client.hset("op:job:odd", "class", "4")
    reaper(redis_url, reap_s=0.0).reap()
    assert not redis_client.exists("op:used:ann")
    assert states(books, "a") == [JobState.CANCELLED]
