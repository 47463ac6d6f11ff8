"""A job that has not ended by its deadline fails, wherever it stands; nobody but the ledger decides that."""

import pytest
import redis

from overpaint_shared.errors import DeadlineError, OverpaintError
from overpaint_shared.ledger import Beat, Cancelled, Done, Failed, JobState, Ledger, ReleaseReason
from tests.integration.ledgers import (
    Books,
    collect,
    expire_lease,
    job,
    ledger,
    names,
    reaper,
    running,
    states,
)


def pass_deadline(client: redis.Redis, job_id: str) -> None:
    """What time does."""
    client.hset(f"op:job:{job_id}", "deadline", "1")
    client.zadd("op:deadlines", {job_id: 1.0}, xx=True)


def error_of(books: Ledger, job_id: str) -> OverpaintError:
    record = books.job(job_id)
    assert record is not None
    assert record.error is not None, record
    return OverpaintError.from_json(record.error)


def is_late(books: Ledger, client: redis.Redis, job_id: str = "a") -> bool:
    Books(client).check(window=64)
    late = states(books, job_id) == [JobState.FAILED]
    return late and isinstance(error_of(books, job_id), DeadlineError)


def test_a_queued_job_past_its_deadline_fails_and_the_next_takes_its_place(
    redis_url: str, redis_client: redis.Redis
) -> None:
    books = reaper(redis_url, window=1)
    books.submit([job("a", deadline_s=60.0), job("b")])
    assert books.reap().late == ()
    pass_deadline(redis_client, "a")
    with books.events("ann") as events:
        reaped = books.reap()
        assert collect(events, JobState.FAILED)[-1].job_id == "a"
    assert reaped.late == ("a",)
    assert "b" in names(reaped.wakeups)
    assert str(error_of(books, "a")).startswith(
        "deadline_s: the job waited in the queue for all of its 60 seconds"
    )
    Books(redis_client).check(window=1)


def test_a_deadline_counts_from_the_submit(books: Ledger) -> None:
    books.submit([job("a", deadline_s=60.0), job("b")])
    record, other = books.job("a"), books.job("b")
    assert record is not None
    assert other is not None
    assert record.deadline == pytest.approx(record.created + 60, abs=0.001)
    assert other.deadline is None


def test_a_claim_that_comes_too_late_gives_the_place_to_the_next_job(
    redis_url: str, redis_client: redis.Redis
) -> None:
    books = ledger(redis_url, window=1)
    books.submit([job("a", deadline_s=60.0), job("b")])
    pass_deadline(redis_client, "a")
    claim = books.claim("a", "w1")
    assert (claim.verdict, names(claim.wakeups)) == ("skip", ["b"])
    Books(redis_client).check(window=1)


def test_a_job_past_its_deadline_is_not_claimed(books: Ledger, redis_client: redis.Redis) -> None:
    books.submit([job("a", deadline_s=60.0)])
    pass_deadline(redis_client, "a")
    assert books.claim("a", "w1").verdict == "skip"
    assert is_late(books, redis_client)


def test_a_running_job_past_its_deadline_is_stopped_and_fails(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    token = running(books, deadline_s=60.0)
    assert books.renew("w1", [Beat("a", token)]) == {"a": "ok"}
    pass_deadline(redis_client, "a")
    reaper(redis_url, lease_s=60.0)._reaper._round()
    assert books.renew("w1", [Beat("a", token)]) == {"a": "cancel"}
    assert states(books, "a") == [JobState.RUNNING]
    for _ in range(2):  # the first answer was lost
        finished = books.finish("a", token, Cancelled())
        assert (finished.accepted, finished.state) == (True, JobState.FAILED)
    assert is_late(books, redis_client)


def test_a_result_that_is_complete_after_the_deadline_is_kept(
    books: Ledger, redis_client: redis.Redis
) -> None:
    token = running(books, deadline_s=60.0)
    pass_deadline(redis_client, "a")
    assert books.finish("a", token, Done({})).state is JobState.DONE
    Books(redis_client).check(window=64)


def test_a_job_that_failed_by_itself_keeps_its_own_error(books: Ledger, redis_client: redis.Redis) -> None:
    token = running(books, deadline_s=60.0)
    pass_deadline(redis_client, "a")
    books.finish("a", token, Failed({"code": "input", "message": "torn"}))
    assert error_of(books, "a").code == "input"


def test_a_cancel_before_the_deadline_stays_a_cancel(books: Ledger, redis_client: redis.Redis) -> None:
    token = running(books, deadline_s=60.0)
    books.cancel("a")
    pass_deadline(redis_client, "a")
    assert books.finish("a", token, Cancelled()).state is JobState.CANCELLED


@pytest.mark.parametrize("reason", ReleaseReason)
def test_a_job_given_back_past_its_deadline_fails(
    books: Ledger, redis_client: redis.Redis, reason: ReleaseReason
) -> None:
    token = running(books, deadline_s=60.0)
    pass_deadline(redis_client, "a")
    released = books.release("a", token, reason)
    assert (released.state, released.wakeups) == (JobState.FAILED, ())
    assert is_late(books, redis_client)


def test_a_job_whose_worker_is_lost_past_its_deadline_fails(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    running(books, deadline_s=60.0)
    pass_deadline(redis_client, "a")
    expire_lease(redis_client, "a")
    assert reaper(redis_url).reap().expired == ("a",)
    assert is_late(books, redis_client)


def test_a_replayed_jobs_time_begins_anew(books: Ledger, redis_url: str, redis_client: redis.Redis) -> None:
    books.submit([job("a", deadline_s=60.0)])
    pass_deadline(redis_client, "a")
    reaper(redis_url).reap()
    books.replay("a")
    assert reaper(redis_url).reap().late == ()
    record = books.job("a")
    assert record is not None
    assert record.deadline == pytest.approx(record.since + 60, abs=0.1)
    Books(redis_client).check(window=64)


def test_a_deadline_whose_index_was_lost_holds(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    books.submit([job("a", deadline_s=60.0)])
    pass_deadline(redis_client, "a")
    redis_client.delete("op:deadlines")
    mender = reaper(redis_url, reap_s=0.0)
    mender.reap()
    assert mender.reap().late == ("a",)


@pytest.mark.parametrize("wrong", [0, -1.0, 1e9, float("nan")])
def test_a_deadline_out_of_range_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="deadline_s"):
        job("a", deadline_s=wrong)
