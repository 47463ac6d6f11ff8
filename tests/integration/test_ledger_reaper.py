"""What the reaper mends, what it leaves alone, and what it forgets."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from overpaint_producer.services import start_redis
from overpaint_shared.errors import (
    EngineDied,
    LedgerUnreachable,
    OverpaintError,
    UnsupportedError,
)
from overpaint_shared.ledger import Beat, Done, Failed, JobState, Ledger, ReleaseReason, Wakeup
from overpaint_shared.ledger.reaper import Reaper
from overpaint_shared.ledger.scripts import CONFIRMED, SLACK_S
from overpaint_shared.queues import list_name, make_app, publish
from overpaint_shared.setting_views import LedgerSettings
from tests.integration.ledgers import Books, expire_lease, job, ledger, names, reaper, states, worker
from tests.waiting import wait_until


def error_of(books: Ledger, job_id: str) -> OverpaintError:
    record = books.job(job_id)
    assert record is not None
    assert record.error is not None, record
    return OverpaintError.from_json(record.error)


# Lost hosts ------------------------------------------------------------


def test_a_job_whose_worker_is_lost_is_queued_again_at_the_front(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    books.announce(worker("w1"))
    books.submit([job("a"), job("b")])
    books.claim("a", "w1")
    expire_lease(redis_client, "a")
    reaped = reaper(redis_url, reap_grace_s=60).reap()
    assert reaped.expired == ("a",)
    assert [(due.job_id, due.front) for due in reaped.wakeups] == [("a", True)]
    record = books.job("a")
    assert record is not None
    assert (record.state, record.lost_hosts, record.crashes) == (JobState.QUEUED, 1, 0)
    assert record.fault == "worker name-of-w1 stopped renewing its lease"


def test_a_live_lease_is_left_alone(books: Ledger, redis_url: str):
    books.submit([job("a")])
    books.claim("a", "w1")
    assert reaper(redis_url).reap().expired == ()


def test_the_holder_of_an_expired_lease_keeps_its_job_if_it_renews_before_the_reaper(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    books.submit([job("a")])
    token = books.claim("a", "w1").token
    expire_lease(redis_client, "a")
    assert books.renew("w1", [Beat("a", token)]) == {"a": "ok"}
    assert reaper(redis_url).reap().expired == ()


def test_a_job_that_loses_too_many_workers_is_dead(books: Ledger, redis_url: str, redis_client: redis.Redis):
    books.submit([job("a")])
    for _ in range(7):
        assert books.claim("a", "w1").verdict == "ok"
        expire_lease(redis_client, "a")
        reaper(redis_url).reap()
    assert states(books, "a") == [JobState.DEAD]
    assert isinstance(error_of(books, "a"), EngineDied)
    assert "7 workers were lost" in str(error_of(books, "a"))


def test_many_losses_count_only_where_other_workers_live(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    """In a farm whose workers fall by the dozen a job that meets many of them is not to blame."""
    mender = reaper(redis_url)
    books.submit([job("unlucky")])
    for number in range(9):
        redis_client.zadd("op:lost", {f"x{number}-{more}": float(redis_client.time()[0]) for more in "ab"})
        assert books.claim("unlucky", f"w{number}").verdict == "ok"
        redis_client.zadd("op:leases", {"unlucky": 1.0}, xx=True)
        mender.reap()
    assert states(books, "unlucky") == [JobState.QUEUED]
    record = books.job("unlucky")
    assert record is not None
    assert record.lost_hosts == 9


def test_losses_of_long_ago_do_not_count_but_there_is_an_end(
    books: Ledger, redis_url: str, redis_client: redis.Redis
) -> None:
    mender = reaper(redis_url)
    books.submit([job("long")])
    for number in range(25):
        assert states(books, "long") == [JobState.QUEUED], number
        assert books.claim("long", f"w{number}").verdict == "ok"
        redis_client.hset("op:job:long", "lost_at", "1 2 3 4 5 6 7 8 9")  # each an hour after the one before
        redis_client.zadd("op:leases", {"long": 1.0}, xx=True)
        mender.reap()
    assert states(books, "long") == [JobState.DEAD]


def test_lost_hosts_do_not_count_as_crashes(books: Ledger, redis_url: str, redis_client: redis.Redis):
    books.submit([job("a")])
    for _ in range(5):
        claim = books.claim("a", "w1")
        assert claim.crashes == 0
        expire_lease(redis_client, "a")
        reaper(redis_url).reap()
    for _ in range(3):
        books.release("a", books.claim("a", "w1").token, ReleaseReason.CRASHED)
    assert states(books, "a") == [JobState.QUEUED]


# Lost messages ------------------------------------------------------------


def send(redis_url: str, wakeups: Iterable[Wakeup]) -> None:
    app = make_app(redis_url)
    publish(app, wakeups)
    app.close()


def test_a_message_lost_from_an_empty_list_is_sent_again(books: Ledger, redis_url: str):
    books.submit([job("a")])
    reaped = reaper(redis_url).reap()
    assert reaped.stale == ("a",)
    assert names(reaped.wakeups) == ["a"]


def test_a_message_is_not_lost_within_the_grace(books: Ledger, redis_url: str):
    books.submit([job("a")])
    assert reaper(redis_url, reap_grace_s=60).reap().stale == ()


def test_a_message_that_still_waits_in_its_list_is_not_sent_again(books: Ledger, redis_url: str):
    for name in "abc":
        send(redis_url, books.submit([job(name)])[0].wakeups)
    assert reaper(redis_url).reap().stale == ()


def test_a_job_older_than_the_next_message_of_its_list_has_lost_its_own(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    books.submit([job("lost")])
    (kept,) = books.submit([job("kept")])
    send(redis_url, kept.wakeups)
    # Five seconds pass between the two: more than a slow publisher takes.
    redis_client.zincrby("op:sent:3:sd15:ann", -5, "lost")
    reaped = reaper(redis_url).reap()
    assert reaped.stale == ("lost",)
    assert reaped.wakeups[0].front


@pytest.mark.parametrize(
    "item",
    [
        "not json",
        "[1]",
        '{"headers":null}',
        '{"headers":{"op_ts":9e99}}',
        '{"headers":{"redelivered":true,"op_ts":NOW}}',
        "x" * 100_000,
    ],
    ids=["no JSON", "a list", "no headers", "a stamp from the future", "a redelivered message", "a long one"],
)
def test_an_item_that_tells_nothing_hides_no_loss_and_makes_nothing_look_lost(
    books: Ledger, redis_url: str, redis_client: redis.Redis, item: str
):
    (lost, kept) = books.submit([job("lost"), job("kept")])
    send(redis_url, kept.wakeups)
    redis_client.rpush(list_name("sd15", 5), item.replace("NOW", str(lost.wakeups[0].stamp)))
    assert reaper(redis_url).reap().stale == ("lost",)
    assert redis_client.llen(list_name("sd15", 5)) == 2, "what is no message is left to a worker"


def without(client: redis.Redis, job_id: str) -> None:
    """What a worker does that takes a message and is killed."""
    (message,) = [one for one in client.lrange(list_name("sd15", 5), 0, -1) if f'"{job_id}"'.encode() in one]
    assert client.lrem(list_name("sd15", 5), 1, message) == 1


def test_a_lost_message_is_noticed_whatever_stands_before_it(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    answers = books.submit([job(f"j{number}") for number in range(60)])
    send(redis_url, [due for answer in answers for due in answer.wakeups])
    without(redis_client, "j45")
    assert reaper(redis_url).reap().stale == ("j45",)
    assert reaper(redis_url, reap_grace_s=60).reap().stale == ()


def test_of_a_very_long_list_what_is_next_is_looked_at(redis_url: str, redis_client: redis.Redis):
    books = ledger(redis_url, window=5000)
    answers = books.submit([job(f"j{number}") for number in range(2300)])
    send(redis_url, [due for answer in answers for due in answer.wakeups])
    for name in ("j9", "j2200"):
        without(redis_client, name)
    for number in range(100):  # five seconds pass between the first hundred and the rest
        redis_client.zincrby("op:sent:3:sd15:ann", -5, f"j{number}")
    assert reaper(redis_url, window=5000).reap().stale == ("j9",)
    books.cancel_all([f"j{number}" for number in range(400)])
    redis_client.ltrim(list_name("sd15", 5), 0, -400)
    assert "j2200" in reaper(redis_url, window=5000).reap().stale


def test_a_message_that_is_being_taken_is_not_lost_until_it_was_missed_for_a_while(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    send(redis_url, books.submit([job("a")])[0].wakeups)
    redis_client.zincrby("op:sent:3:sd15:ann", -100, "a")
    taken = redis_client.rpop(list_name("sd15", 5))
    mender = reaper(redis_url, reap_grace_s=15.0, reap_s=0.0)
    assert mender.reap().stale == ()
    redis_client.rpush(list_name("sd15", 5), taken)
    assert mender.reap().stale == ()
    redis_client.delete(list_name("sd15", 5))
    redis_client.zincrby("op:missed", -5, "a")
    assert mender.reap().stale == ()
    redis_client.zincrby("op:missed", -2, "a")
    assert mender.reap().stale == ("a",)


def test_a_lost_message_is_sent_again_within_fifteen_seconds_by_default() -> None:
    settings = LedgerSettings()
    seen_at = SLACK_S + settings.reap_s
    assert seen_at + CONFIRMED * settings.reap_grace_s + settings.reap_s <= 15


def test_messages_without_work_are_taken_out_of_their_list(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    answers = books.submit([job(f"j{number}") for number in range(40)])
    send(redis_url, [due for answer in answers for due in answer.wakeups])
    books.cancel_all([f"j{number}" for number in range(40) if number not in (7, 30)])
    assert redis_client.llen(list_name("sd15", 5)) == 40
    assert reaper(redis_url).reap().stale == ()
    left = [
        json.loads(message)["headers"]["id"] for message in redis_client.lrange(list_name("sd15", 5), 0, -1)
    ]
    assert left == ["j30", "j7"], "those with work stay, in their order"


def test_two_reapers_visit_a_lane_once_in_a_round(redis_url: str, redis_client: redis.Redis):
    ledger(redis_url).submit([job("a")])
    first, second = (reaper(redis_url, reap_grace_s=60.0) for _ in range(2))
    first.reap()
    visited = redis_client.zscore("op:lanes", "3:sd15:ann")
    second.reap()
    assert redis_client.zscore("op:lanes", "3:sd15:ann") == visited


def test_a_job_sent_to_the_front_does_not_make_the_others_look_lost(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    for name in "abc":
        send(redis_url, books.submit([job(name)])[0].wakeups)
    for name in "bc":
        redis_client.zincrby("op:sent:3:sd15:ann", -10, name)
    claim = books.claim("a", "w1")
    send(redis_url, books.release("a", claim.token, ReleaseReason.STOPPED).wakeups)
    assert reaper(redis_url).reap().stale == ()


def test_a_wider_window_is_filled_by_the_reaper(redis_url: str):
    narrow = ledger(redis_url, window=1)
    narrow.submit([job(name) for name in "abc"])
    reaped = reaper(redis_url, window=2, reap_grace_s=60).reap()
    assert names(reaped.wakeups) == ["b"]


def test_a_lane_that_is_empty_is_forgotten(books: Ledger, redis_url: str, redis_client: redis.Redis):
    books.submit([job("a")])
    books.cancel("a")
    reaper(redis_url).reap()
    assert not redis_client.exists("op:lanes")


# Waiting too long ------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 0], ids=["with a message", "without a message"])
def test_a_job_that_waits_too_long_moves_up_one_class_at_a_time(
    redis_url: str, window: int, redis_client: redis.Redis
):
    ledger(redis_url, window=window).submit([job("a", priority=9)])
    up = reaper(redis_url, age_s=0.0, window=1)
    seen = []
    for _ in range(4):
        reaped = up.reap()
        record = up.job("a")
        assert record is not None
        seen.append((record.priority_class, [due.priority for due in reaped.wakeups]))
        Books(redis_client).check(window=1)
    assert [classes for classes, _ in seen] == [6, 3, 0, 0]
    assert all(due == [classes] for classes, due in seen)


def test_a_job_that_waited_too_long_and_whose_message_was_lost_moves_up_at_once(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    books.submit([job("a", priority=9)])
    # It waited for a place first, so its message is younger than its wait; and no list holds that message.
    redis_client.hincrbyfloat("op:job:a", "since", -1000)
    reaped = reaper(redis_url, age_s=600.0).reap()
    assert [(due.job_id, due.priority) for due in reaped.wakeups] == [("a", 6)]
    Books(redis_client).check(window=64)


def test_a_job_that_has_not_waited_long_stays_in_its_class(redis_url: str):
    books = reaper(redis_url, age_s=600.0)
    books.submit([job("a", priority=9)])
    books.reap()
    record = books.job("a")
    assert record is not None
    assert record.priority_class == 9


def test_a_replayed_job_starts_in_the_class_it_was_submitted_to(redis_url: str):
    books = reaper(redis_url, age_s=0.0)
    books.submit([job("a", priority=9)])
    books.reap()
    books.finish("a", books.claim("a", "w1").token, Failed({"code": "input", "message": "torn"}))
    assert [due.priority for due in books.replay("a")] == [9]


# Jobs that nobody can render ------------------------------------------------------------


def test_a_worker_that_lacks_a_feature_leaves_the_job_to_others(books: Ledger, redis_url: str):
    books.submit([job("a", features={"lora", "vae"})])
    old = books.claim("a", "old", features={"lora"})
    assert (old.verdict, old.wakeups) == ("skip", ())  # no wake-up here: alone, it would spin
    record = books.job("a")
    assert record is not None
    assert (record.state, record.attempt, record.excluded) == (JobState.QUEUED, 0, {"old"})
    reaped = reaper(redis_url, reap_grace_s=60).reap()
    assert names(reaped.wakeups) == ["a"]  # the next round, not the next grace
    assert books.claim("a", "new", features={"lora", "vae", "more"}).verdict == "ok"


def test_a_feature_is_matched_whole(books: Ledger):
    books.submit([job("a", features={"vae"})])
    assert books.claim("a", "w1", features={"vae:tiled", "my-vae"}).verdict == "skip"


def test_a_worker_that_gave_a_job_back_as_unable_does_not_get_it_again(books: Ledger, redis_url: str):
    books.submit([job("a")])
    token = books.claim("a", "w1").token
    released = books.release("a", token, ReleaseReason.UNABLE, "no such sampler")
    assert names(released.wakeups) == ["a"]
    assert books.claim("a", "w1").verdict == "skip"
    assert names(reaper(redis_url, reap_grace_s=60).reap().wakeups) == ["a"]
    claim = books.claim("a", "w2")
    assert (claim.verdict, claim.crashes) == ("ok", 0)


def test_a_message_in_the_wrong_queue_excludes_nobody(books: Ledger):
    books.submit([job("a")])
    assert books.claim("a", "w1", models={"sdxl"}).verdict == "skip"
    assert books.claim("a", "w1", models={"sd15"}).verdict == "ok"


def test_a_job_whose_feature_no_live_worker_has_fails_naming_it(books: Ledger, redis_url: str):
    books.announce(worker("w1", features={"lora"}))
    books.submit([job("a", features={"lora", "mask:clipseg"})])
    books.claim("a", "w1", features={"lora"})
    reaped = reaper(redis_url, unable_after_s=0.0).reap()
    assert reaped.unable == ("a",)
    assert isinstance(error_of(books, "a"), UnsupportedError)
    assert "mask:clipseg" in str(error_of(books, "a"))
    assert states(books, "a") == [JobState.FAILED]


def test_a_job_that_every_worker_gave_back_fails_with_what_the_last_one_said(books: Ledger, redis_url: str):
    books.announce(worker("w1"))
    books.submit([job("a")])
    books.release("a", books.claim("a", "w1").token, ReleaseReason.UNABLE, "the device is too small")
    books.claim("a", "w1")
    assert reaper(redis_url, unable_after_s=0.0).reap().unable == ("a",)
    assert "too small" in str(error_of(books, "a"))


def test_a_job_is_not_failed_while_another_live_worker_can_render_it(books: Ledger, redis_url: str):
    books.announce(worker("old"))
    books.announce(worker("new", features={"lora"}))
    books.submit([job("a", features={"lora"})])
    books.claim("a", "old", features=())
    assert reaper(redis_url, unable_after_s=0.0).reap().unable == ()


def test_a_job_is_not_failed_before_its_time(books: Ledger, redis_url: str):
    books.announce(worker("old"))
    books.submit([job("a", features={"lora"}), job("b", model="sdxl")])
    books.claim("a", "old", features=())
    assert reaper(redis_url, unable_after_s=60.0).reap().unable == ()


def test_jobs_of_a_model_that_no_live_worker_serves_fail_naming_it(redis_url: str):
    books = ledger(redis_url, window=1)
    books.announce(worker("w1", "sd15"))
    books.submit([job("a", model="sdxl"), job("b", model="sdxl"), job("c", model="sd15")])
    reaped = reaper(redis_url, unable_after_s=0.0).reap()
    assert sorted(reaped.unable) == ["a", "b"]
    assert "sdxl" in str(error_of(books, "a"))
    assert states(books, "c") == [JobState.QUEUED]


def test_with_no_live_worker_nothing_is_failed(books: Ledger, redis_url: str):
    books.submit([job("a", model="sdxl")])
    assert reaper(redis_url, unable_after_s=0.0).reap().unable == ()


def test_times_in_which_nobody_watched_do_not_count_against_a_model(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    books.announce(worker("w1", "sd15"))
    books.submit([job("a", model="sdxl")])
    reaper(redis_url, unable_after_s=60.0).reap()
    first, last = redis_client.hget("op:unserved", "sdxl").decode().split()
    an_hour_ago = f"{float(first) - 3600} {float(last) - 3600}"
    redis_client.hset("op:unserved", "sdxl", an_hour_ago)
    assert reaper(redis_url, unable_after_s=60.0).reap().unable == ()
    redis_client.hset("op:unserved", "sdxl", f"{float(first) - 3600} {last}")
    assert reaper(redis_url, unable_after_s=60.0, lease_s=0).reap().unable == ("a",)


def test_a_model_that_is_served_again_is_no_longer_watched(
    books: Ledger, redis_url: str, redis_client: redis.Redis
):
    books.announce(worker("w1", "sd15"))
    books.submit([job("a", model="sdxl")])
    reaper(redis_url).reap()
    books.announce(worker("w2", "sdxl"))
    reaper(redis_url).reap()
    assert not redis_client.exists("op:unserved")


# Holding ------------------------------------------------------------


def test_the_reaper_holds_one_lease_after_a_silence(redis_url: str, redis_client: redis.Redis):
    wait_until(
        lambda: redis_client.info("server")["uptime_in_seconds"] >= 2, what="Redis is older than a lease"
    )
    books = ledger(redis_url, lease_s=1.0, reap_s=3.0)
    mender: Reaper = books._reaper
    assert not mender.reap(100.0).holding
    assert not mender.reap(103.0).holding
    assert mender.reap(110.0).holding  # longer than two rounds
    assert mender.reap(110.9).holding
    assert not mender.reap(111.1).holding


def test_the_reaper_holds_one_lease_after_redis_restarted_and_then_mends(tmp_path: Path):
    server = start_redis(tmp_path)
    try:
        books = ledger(server.url, lease_s=2.0)
        token = _submitted_and_claimed(books)
        assert books.reap().holding  # a young server
        server.kill()
        with pytest.raises(LedgerUnreachable):
            books.reap()
        server = start_redis(tmp_path)
        assert books.reap().holding
        assert books.renew("w1", [Beat("a", token)]) == {"a": "ok"}  # its owner was only cut off
        wait_until(lambda: books.reap().expired == ("a",), what="the lease ran out and was reaped")
        assert states(books, "a") == [JobState.QUEUED]
    finally:
        server.stop()


def _submitted_and_claimed(books: Ledger) -> int:
    books.submit([job("a")])
    return books.claim("a", "w1").token


# Forgetting ------------------------------------------------------------


def test_ended_records_are_swept_with_every_trace(redis_url: str, redis_client: redis.Redis):
    books = reaper(redis_url, keep_done_s=0, keep_failed_s=0)
    books.submit([job(name, group="g", token=name) for name in "abcd"])
    books.finish("a", books.claim("a", "w1").token, Done({"image.png": "k"}))
    books.finish("b", books.claim("b", "w1").token, Failed({"code": "input", "message": "torn"}))
    books.cancel("c")
    books.claim("d", "w1")
    books.cancel("d")
    books.reap()
    assert books.jobs() == []
    kept = {
        key.decode()
        for key in redis_client.scan_iter("op:*")
        if not key.startswith((b"op:pace:", b"op:rate:", b"op:scripts", b"op:audit"))
    }
    assert kept <= {"op:token", "op:moves", "op:scrub", "op:lost"}  # the farm's totals name no job
    (again,) = books.submit([job("e", token="a", spec_json="{}")])
    assert again.created


def test_live_records_and_those_within_their_time_are_kept(redis_url: str):
    books = ledger(redis_url, keep_done_s=1000, keep_failed_s=0)
    eager = reaper(redis_url, keep_done_s=1000, keep_failed_s=0, lease_s=0)
    books.submit([job(name) for name in "abc"])
    books.finish("a", books.claim("a", "w1").token, Done({}))
    books.claim("b", "w1")
    eager.reap()
    assert states(books, "a", "b", "c") == [JobState.DONE, JobState.RUNNING, JobState.QUEUED]


def test_a_replayed_record_does_not_expire(redis_url: str):
    books = reaper(redis_url, keep_failed_s=0)
    books.submit([job("a")])
    books.finish("a", books.claim("a", "w1").token, Failed({"code": "input", "message": "torn"}))
    books.replay("a")
    books.reap()
    assert states(books, "a") == [JobState.QUEUED]


def test_a_worker_that_names_no_models_serves_all_that_it_has(books: Ledger, redis_url: str):
    everything = replace(worker("w1"), models=(), catalogue=({"kind": "model", "name": "sdxl"},))
    books.announce(everything)
    books.submit([job("a", model="sdxl"), job("b", model="sd15")])
    assert reaper(redis_url, unable_after_s=0.0).reap().unable == ("b",)
