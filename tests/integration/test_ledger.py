"""The ledger's calls, one by one, on a real Redis."""

import threading

import pytest
import redis
from redis.exceptions import ResponseError

from overpaint_shared.errors import (
    EngineDied,
    OverpaintError,
    UnknownJob,
    WorkerFault,
)
from overpaint_shared.ledger import (
    Beat,
    Cancelled,
    Done,
    Failed,
    JobState,
    Ledger,
    ReleaseReason,
)
from overpaint_shared.ledger.scripts import source
from tests.integration.ledgers import (
    collect,
    expire_lease,
    job,
    ledger,
    names,
    reaper,
    running,
    states,
    worker,
)
from tests.waiting import wait_until


def test_a_submitted_job_has_a_record_and_a_message_due(books: Ledger):
    (answer,) = books.submit(
        [job("a", group="g", labels={"shot": "12"}, features=frozenset({"method:img2img"}))]
    )
    assert answer.created
    assert [(due.job_id, due.model, due.priority, due.title) for due in answer.wakeups] == [
        ("a", "sd15", 3, "a")
    ]
    record = books.job("a")
    assert record is not None
    assert record.state is JobState.QUEUED
    assert (record.group, record.labels, record.spec_json) == ("g", {"shot": "12"}, '{"version":1}')
    assert record.features == {"method:img2img"}
    assert record.to_json()["spec"] == {"version": 1}


def test_a_job_runs_from_claim_to_commit(books: Ledger):
    token = running(books)
    assert books.renew("w1", [Beat("a", token, "denoise", 3, 20)]) == {"a": "ok"}
    record = books.job("a")
    assert record is not None
    assert (record.stage, record.step, record.of, record.worker) == ("denoise", 3, 20, "w1")
    finished = books.finish("a", token, Done({"image.png": "results/a/1/image.png"}))
    assert finished.accepted
    record = books.job("a")
    assert record is not None
    assert record.state is JobState.DONE
    assert record.result == {"image.png": "results/a/1/image.png"}
    assert record.ended is not None
    assert record.lease is None


def test_a_running_job_is_busy_for_everyone_its_own_worker_included(books: Ledger):
    running(books)
    assert books.claim("a", "w1").verdict == "busy"
    assert books.claim("a", "w2").verdict == "busy"


def test_a_job_whose_lease_ran_out_is_busy_until_the_reaper_has_counted_it(
    books: Ledger, redis_client: redis.Redis
):
    running(books)
    expire_lease(redis_client, "a")
    assert books.claim("a", "w2").verdict == "busy"


def test_only_one_of_many_claims_at_once_wins(books: Ledger):
    books.submit([job("a")])
    start, verdicts = threading.Barrier(8), []

    def claim(number: int) -> None:
        start.wait()
        verdicts.append(books.claim("a", f"w{number}").verdict)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verdicts) == ["busy"] * 7 + ["ok"]


def test_tokens_rise_over_all_jobs_and_are_not_reset_by_replay(books: Ledger):
    first = running(books, "a")
    second = running(books, "b")
    books.finish("a", first, Failed({"code": "input", "message": "torn"}))
    books.replay("a")
    third = books.claim("a", "w1")
    assert first < second < third.token
    assert third.attempt == 1


def test_a_token_that_redis_forgot_in_a_crash_is_not_given_out_again(
    books: Ledger, redis_client: redis.Redis
):
    forgotten = running(books, "a")
    redis_client.delete("op:token")  # the last second of the append-only file is gone
    redis_client.delete("op:job:a", "op:leases", "op:state:running")
    books.submit([job("b")])
    assert books.claim("b", "w1").token > forgotten


def test_a_stale_token_commits_nothing(books: Ledger, redis_client: redis.Redis, redis_url: str):
    stale = running(books)
    expire_lease(redis_client, "a")
    reaper(redis_url).reap()
    assert not books.finish("a", stale, Done({"image.png": "early"})).accepted
    current = books.claim("a", "w2").token
    assert not books.finish("a", stale, Done({"image.png": "stale"})).accepted
    assert not books.finish("a", stale, Failed({"code": "input", "message": "stale"})).accepted
    assert books.finish("a", current, Done({"image.png": "current"})).accepted
    record = books.job("a")
    assert record is not None
    assert record.result == {"image.png": "current"}


def test_a_finish_whose_answer_was_lost_is_accepted_when_asked_again(books: Ledger):
    token = running(books)
    assert books.finish("a", token, Done({})).accepted
    assert books.finish("a", token, Done({})).accepted
    assert not books.finish("a", token, Failed({"code": "input", "message": "no"})).accepted


def test_a_claim_whose_answer_was_lost_gives_the_same_token_again(
    books: Ledger, monkeypatch: pytest.MonkeyPatch
):
    class SameCall:
        hex = "one-call"

    monkeypatch.setattr("overpaint_shared.ledger.ledger.uuid.uuid4", SameCall)
    books.submit([job("a")])
    first, again = books.claim("a", "w1"), books.claim("a", "w1")
    assert (first.verdict, again.verdict) == ("ok", "ok")
    assert (first.token, first.attempt, first.spec_json) == (again.token, again.attempt, again.spec_json)


def test_a_renewal_moves_the_lease_for_all_jobs_in_one_call(books: Ledger, redis_client: redis.Redis):
    beats = [Beat(job_id, running(books, job_id)) for job_id in "abc"]
    for job_id in "abc":
        expire_lease(redis_client, job_id)
    before = redis_client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert books.renew("w1", [*beats, Beat("gone", 1)]) == {"a": "ok", "b": "ok", "c": "ok", "gone": "lost"}
    assert redis_client.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 1
    (seconds, _) = redis_client.time()
    leases = dict(redis_client.zrange("op:leases", 0, -1, withscores=True))
    assert all(lease > seconds + 50 for lease in leases.values())


def test_progress_is_published_once_per_change(books: Ledger):
    token = running(books)
    with books.events("ann") as events:
        for step in (1, 1, 2):
            books.renew("w1", [Beat("a", token, "denoise", step, 20)])
        books.finish("a", token, Done({}))
        seen = collect(events, JobState.DONE)
    assert [(event.state, event.stage, event.step) for event in seen] == [
        (JobState.RUNNING, "denoise", 1),
        (JobState.RUNNING, "denoise", 2),
        (JobState.DONE, None, 0),
    ]


def test_events_of_other_owners_and_jobs_are_not_seen(books: Ledger):
    with books.events("ann", ids={"b"}) as events:
        books.submit([job("a"), job("x", owner="bob"), job("b")])
        books.cancel("b")
        assert [event.job_id for event in collect(events, JobState.CANCELLED)] == ["b", "b"]


def test_a_queued_job_is_cancelled_at_once_and_never_runs(books: Ledger):
    books.submit([job("a")])
    assert books.cancel("a").state is JobState.CANCELLED
    assert books.claim("a", "w1").verdict == "skip"


def test_a_running_job_is_cancelled_when_its_worker_confirms(books: Ledger):
    token = running(books)
    assert books.cancel("a").state is JobState.CANCELLING
    assert books.renew("w1", [Beat("a", token)]) == {"a": "cancel"}
    assert books.finish("a", token, Cancelled()).accepted
    assert states(books, "a") == [JobState.CANCELLED]


def test_a_picture_that_was_finished_before_the_cancel_was_seen_is_kept(books: Ledger):
    token = running(books)
    books.cancel("a")
    assert books.finish("a", token, Done({"image.png": "k"})).accepted
    assert states(books, "a") == [JobState.DONE]
    assert books.cancel("a").state is JobState.DONE


@pytest.mark.parametrize("how", ["failed", "crashed", "stopped", "unable", "reaped"])
def test_a_cancelling_job_ends_cancelled_whatever_happens_to_its_worker(
    books: Ledger, how: str, redis_url: str, redis_client: redis.Redis
):
    token = running(books)
    books.cancel("a")
    if how == "failed":
        for _ in range(2):  # the answer to the first call may have been lost
            finished = books.finish("a", token, Failed({"code": "input", "message": "torn"}))
            assert (finished.accepted, finished.state) == (True, JobState.CANCELLED)
    elif how == "reaped":
        expire_lease(redis_client, "a")
        reaper(redis_url).reap()
    else:
        books.release("a", token, ReleaseReason(how))
    record = books.job("a")
    assert record is not None
    assert record.state is JobState.CANCELLED
    assert record.error is None


def test_an_unknown_job_is_gone(books: Ledger):
    assert books.job("nobody") is None
    assert books.claim("nobody", "w1").verdict == "gone"
    assert books.cancel("nobody").state is None
    assert books.release("nobody", 1, ReleaseReason.STOPPED).state is None
    assert books.finish("nobody", 1, Done({})).state is None
    with pytest.raises(UnknownJob):
        books.replay("nobody")


def test_a_released_job_is_due_at_the_front_and_counts_nothing(books: Ledger):
    token = running(books)
    released = books.release("a", token, ReleaseReason.STOPPED)
    assert released.state is JobState.QUEUED
    assert [due.front for due in released.wakeups] == [True]
    record = books.job("a")
    assert record is not None
    assert (record.crashes, record.lost_hosts) == (0, 0)
    assert books.claim("a", "w2").verdict == "ok"


def test_a_renewal_with_another_token_is_lost(books: Ledger):
    token = running(books)
    assert books.renew("w1", [Beat("a", token + 1)]) == {"a": "lost"}
    books.release("a", token, ReleaseReason.STOPPED)
    assert books.renew("w1", [Beat("a", token)]) == {"a": "lost"}


def test_a_release_with_a_stale_token_changes_nothing(books: Ledger):
    stale = running(books)
    books.release("a", stale, ReleaseReason.STOPPED)
    current = books.claim("a", "w2").token
    assert books.release("a", stale, ReleaseReason.CRASHED).state is JobState.RUNNING
    assert books.renew("w2", [Beat("a", current)]) == {"a": "ok"}


def test_a_worker_without_memory_is_asked_again_later_and_after_three_refusals_no_more(
    books: Ledger, redis_url: str
):
    quick = ledger(redis_url, unable_after_s=0.2)
    quick.submit([job("a")])

    def refused() -> frozenset[str]:
        claim = wait_until(lambda: (found := quick.claim("a", "w1")).verdict == "ok" and found)
        quick.release("a", claim.token, ReleaseReason.NO_MEMORY, "800 MiB of 8192 MiB are free")
        assert quick.claim("a", "w1").verdict == "skip"
        record = quick.job("a")
        assert record is not None
        assert (record.crashes, record.fault) == (0, "800 MiB of 8192 MiB are free")
        return record.excluded

    assert [refused(), refused(), refused()] == [frozenset(), frozenset(), {"w1"}]
    assert quick.claim("a", "w2").verdict == "ok", "another worker may have the memory"


def test_a_suspect_is_not_counted_and_runs_alone_until_it_is_replayed(books: Ledger):
    token = running(books)
    books.release("a", token, ReleaseReason.SUSPECTED, "killed by signal 9")
    claim = books.claim("a", "w2")
    assert (claim.verdict, claim.crashes, claim.suspect, claim.alone) == ("ok", 0, True, True)
    books.finish("a", claim.token, Failed({"code": "job", "message": "m"}))
    books.replay("a")
    assert books.claim("a", "w2").alone is False


def test_a_job_that_crashes_too_often_is_dead_and_says_what_happened(books: Ledger):
    books.announce(worker("w1"))
    books.submit([job("a")])
    for crashes in range(4):
        claim = books.claim("a", "w1")
        assert (claim.verdict, claim.crashes) == ("ok", crashes)
        released = books.release("a", claim.token, ReleaseReason.CRASHED, "killed by signal 11")
    assert released.state is JobState.DEAD
    record = books.job("a")
    assert record is not None
    assert record.error is not None
    error = OverpaintError.from_json(record.error)
    assert isinstance(error, EngineDied)
    assert "4 times" in str(error)
    assert "name-of-w1" in str(error)
    assert "signal 11" in str(error)
    assert books.claim("a", "w1").verdict == "dead"


def test_a_worker_that_itself_fails_at_a_job_is_told_as_that_and_not_as_a_dead_engine(books: Ledger):
    books.submit([job("a")])
    for _ in range(4):
        claim = books.claim("a", "w1")
        released = books.release("a", claim.token, ReleaseReason.FAULT, "ValueError: a defect")
    assert released.state is JobState.DEAD
    record = books.job("a")
    assert record is not None
    assert record.error is not None
    assert record.crashes == 0
    error = OverpaintError.from_json(record.error)
    assert isinstance(error, WorkerFault)
    assert "ValueError: a defect" in str(error)
    assert books.replay("a")
    books.release("a", books.claim("a", "w1").token, ReleaseReason.FAULT)
    assert books.claim("a", "w1").verdict == "ok", "its faults are counted anew"


def test_a_job_id_that_no_stored_file_could_have_is_refused():
    with pytest.raises(ValueError, match="job id"):
        job("-a")


def test_a_dead_job_is_replayed_with_its_counts_reset(books: Ledger, redis_url: str):
    stern = ledger(redis_url, max_crashes=0)
    token = running(books)
    assert stern.release("a", token, ReleaseReason.CRASHED).state is JobState.DEAD
    assert names(books.replay("a")) == ["a"]
    record = books.job("a")
    assert record is not None
    assert (record.state, record.crashes, record.attempt, record.error, record.fault) == (
        JobState.QUEUED,
        0,
        0,
        None,
        None,
    )
    assert record.token == token


@pytest.mark.parametrize("state", ["done", "cancelled", "running"])
def test_a_job_that_did_not_fail_cannot_be_replayed(books: Ledger, state: str):
    token = running(books)
    if state != "running":
        books.finish("a", token, Done({}) if state == "done" else Cancelled())
    with pytest.raises(OverpaintError, match=f"a is {state}"):
        books.replay("a")
    assert states(books, "a") == [JobState(state)]


# What Lua may not do ------------------------------------------------------------


def test_lua_refuses_a_move_that_the_table_does_not_have(books: Ledger, redis_client: redis.Redis):
    books.submit([job("a")])
    script = source("cancel").split("local who, window")[0] + "move(load('a'), 'done', clock(), 1)"
    with pytest.raises(ResponseError, match="illegal move of job a: queued to done"):
        redis_client.eval(script, 0)
    assert states(books, "a") == [JobState.QUEUED]
