"""Whose jobs have messages, which submission stands for which job, and what can be asked of the ledger."""

import pytest
import redis

from overpaint_shared.errors import (
    TokenConflict,
)
from overpaint_shared.ledger import (
    Done,
    JobState,
    Ledger,
    ReleaseReason,
    SubmitConflict,
    spec_digest,
)
from tests.integration.ledgers import (
    Books,
    job,
    ledger,
    names,
    running,
    states,
    worker,
)
from tests.waiting import wait_until

# Fair share ------------------------------------------------------------


def test_at_most_a_window_of_an_owners_jobs_has_a_message_and_claims_admit_the_next(redis_url: str):
    books = ledger(redis_url, window=2)
    answers = books.submit([job(name) for name in "abcd"])
    assert [names(answer.wakeups) for answer in answers] == [["a"], ["b"], [], []]
    assert names(books.claim("a", "w1").wakeups) == ["c"]
    assert names(books.cancel("b").wakeups) == ["d"]
    assert books.depth("sd15") == 2


def test_owners_models_and_classes_have_windows_of_their_own(redis_url: str):
    books = ledger(redis_url, window=1)
    jobs = [
        job("a"),
        job("b", owner="bob"),
        job("c", model="sdxl"),
        job("d", priority=0),
        job("e", priority=4),
    ]
    answers = books.submit(jobs)
    assert [len(answer.wakeups) for answer in answers] == [1, 1, 1, 1, 0]


def test_a_job_that_comes_back_does_not_wait_for_a_place(redis_url: str, redis_client: redis.Redis):
    books = ledger(redis_url, window=1)
    books.submit([job(name) for name in "abc"])
    claim = books.claim("a", "w1")
    assert names(claim.wakeups) == ["b"]
    assert names(books.release("a", claim.token, ReleaseReason.STOPPED).wakeups) == ["a"]
    assert books.claim("b", "w1").wakeups == ()  # the place is still taken by `a`
    assert names(books.claim("a", "w1").wakeups) == ["c"]
    Books(redis_client).check(window=1)


# Tokens of submissions ------------------------------------------------------------


def test_the_same_token_and_spec_give_the_job_that_is_there(books: Ledger):
    (first,) = books.submit([job("a", token="t")])
    (again,) = books.submit([job("b", token="t")])
    assert (again.id, again.created) == ("a", False)
    assert names(again.wakeups) == ["a"]  # the first caller may have died before it published
    assert books.job("b") is None
    assert first.created


def test_a_token_is_scoped_to_its_owner(books: Ledger):
    books.submit([job("a", token="t")])
    (other,) = books.submit([job("b", token="t", owner="bob", spec_json='{"version":2}')])
    assert other.created


def test_a_token_never_stands_for_another_spec_and_the_rest_is_submitted(books: Ledger):
    books.submit([job("a", token="t")])
    with pytest.raises(TokenConflict, match="t") as conflict:
        books.submit([job("b"), job("c", token="t", spec_json="{}"), job("d")])
    assert isinstance(conflict.value, SubmitConflict)
    assert [answer.id for answer in conflict.value.submitted] == ["b", "d"]
    assert states(books, "b", "c", "d") == [JobState.QUEUED] * 2


def test_a_seed_drawn_at_submit_does_not_make_it_another_spec(books: Ledger):
    wrote = spec_digest('{"seed":null}')
    books.submit([job("a", token="t", spec_json='{"seed":1}', digest=wrote)])
    (again,) = books.submit([job("b", token="t", spec_json='{"seed":2}', digest=wrote)])
    assert again.id == "a"


def test_a_submission_asked_twice_makes_one_job(books: Ledger):
    books.submit([job("a")])
    (again,) = books.submit([job("a")])
    assert (again.id, again.created) == ("a", False)
    assert books.depth() == 1


def test_a_done_job_keeps_its_token(books: Ledger):
    token = running(books, token="t")
    books.finish("a", token, Done({}))
    (again,) = books.submit([job("b", token="t")])
    assert (again.id, again.wakeups) == ("a", ())
    assert states(books, "a") == [JobState.DONE]


@pytest.mark.parametrize(
    "wrong",
    [
        {"job_id": "a b"},
        {"job_id": "a", "priority": 10},
        {"job_id": "a", "model": "a:b"},
        {"job_id": "a", "owner": ""},
    ],
    ids=["an id with a space", "priority 10", "a model with a colon", "no owner"],
)
def test_a_submission_that_would_break_keys_is_refused(wrong: dict):
    with pytest.raises(ValueError, match="must"):
        job(**wrong)


# Queries ------------------------------------------------------------


def test_listings_are_newest_first_and_filtered(books: Ledger):
    books.submit(
        [
            job("a", group="g"),
            job("b", owner="bob"),
            job("c", model="sdxl", labels={"shot": "1"}),
            job("d", group="g"),
        ]
    )
    token = books.claim("d", "w1").token
    books.finish("d", token, Done({}))

    def ids(**wanted) -> list[str]:
        return [record.id for record in books.jobs(**wanted)]

    assert ids() == ["d", "c", "b", "a"]
    assert ids(limit=2) == ["d", "c"]
    assert ids(owner="ann") == ["d", "c", "a"]
    assert ids(owner="ann", group="g") == ["d", "a"]
    assert ids(state=JobState.QUEUED) == ["c", "b", "a"]
    assert ids(owner="ann", state={JobState.DONE, JobState.FAILED}) == ["d"]
    assert ids(model="sdxl") == ["c"]
    assert ids(labels={"shot": "1"}) == ["c"]
    assert ids(labels={"shot": "2"}) == []


def test_a_listing_longer_than_one_read_is_whole_and_in_order(books: Ledger):
    wanted = [f"j{number:04}" for number in range(450)]
    books.submit([job(name) for name in wanted])
    assert [record.id for record in books.jobs(limit=1000)] == wanted[::-1]


def test_depth_counts_and_the_oldest_wait_follow_the_queue(books: Ledger):
    assert books.oldest_waiting("sd15") is None
    books.submit([job("a"), job("b"), job("c", model="sdxl")])
    assert (books.depth(), books.depth("sd15"), books.depth("none")) == (3, 2, 0)
    waited = books.oldest_waiting("sd15")
    assert waited is not None
    wait_until(lambda: (books.oldest_waiting("sd15") or 0) > waited, what="the wait grows")
    books.claim("a", "w1")
    assert books.counts()[JobState.QUEUED] == 2
    assert books.counts()[JobState.RUNNING] == 1


def test_workers_are_known_until_they_leave_or_fall_silent(books: Ledger):
    books.announce(worker("w1", "sd15", features={"lora"}))
    books.announce(worker("w2"))
    books.announce(worker("w3"), ttl=0.001)
    wait_until(lambda: len(books.workers()) == 2, what="the silent worker is forgotten")
    assert books.workers()[0] == worker("w1", "sd15", features={"lora"})
    books.retire("w1")
    assert [record.id for record in books.workers()] == ["w2"]


def test_cancelling_many_gives_no_place_to_those_that_are_cancelled_next(
    redis_url: str, redis_client: redis.Redis
):
    books = ledger(redis_url, window=4)
    books.submit([job(f"j{number}", group="g") for number in range(1200)])
    books.submit([job("other")])
    redis_client.config_resetstat()
    cancelled = books.cancel_all(books.group("ann", "g")[::-1])
    assert redis_client.info("commandstats")["cmdstat_evalsha"]["calls"] <= 4, "a call for hundreds"
    assert set(cancelled.states.values()) == {JobState.CANCELLED}
    assert names(cancelled.wakeups) == ["other"], "one message, of the job that is next"
    Books(redis_client).check(window=4)


def test_cancelling_many_stops_those_that_run_and_leaves_what_has_ended(books: Ledger):
    running(books, "runs")
    books.finish("ended", running(books, "ended"), Done({}))
    books.submit([job("waits")])
    cancelled = books.cancel_all(["waits", "runs", "ended", "nobody"])
    assert cancelled.states == {
        "waits": JobState.CANCELLED,
        "runs": JobState.CANCELLING,
        "ended": JobState.DONE,
        "nobody": None,
    }
