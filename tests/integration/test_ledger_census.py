"""What watches a farm is told the truth: counts, rates and places."""

import redis

from overpaint_shared.ledger import Cancelled, Count, Done, Failed, Ledger, Place, ReleaseReason
from tests.integration.ledgers import job, ledger, reaper, worker

IMG2IMG = frozenset({"method:img2img", "sampler:euler"})


def counted(counts: list[Count]) -> dict[tuple[str, str, str], int]:
    return {(count.state, count.model, count.method): count.jobs for count in counts}


def test_jobs_are_counted_by_state_model_and_method_without_reading_them(redis_url: str) -> None:
    books = ledger(redis_url)
    books.submit([job("a", features=IMG2IMG), job("b", features=IMG2IMG), job("c", model="sdxl")])
    books.claim("a", "w1")
    assert counted(books.census()) == {
        ("running", "sd15", "img2img"): 1,
        ("queued", "sd15", "img2img"): 1,
        ("queued", "sdxl", ""): 1,
    }
    assert counted(books.moves()) == {
        ("running", "sd15", "img2img"): 1,
        ("queued", "sd15", "img2img"): 2,
        ("queued", "sdxl", ""): 1,
    }


def test_a_submit_that_is_asked_twice_is_counted_once(redis_url: str) -> None:
    books = ledger(redis_url)
    for _ in range(2):
        books.submit([job("a")])
    assert counted(books.census()) == {("queued", "sd15", ""): 1}


def test_a_job_that_comes_back_is_one_job_and_two_moves(redis_url: str) -> None:
    books = ledger(redis_url)
    books.submit([job("a")])
    books.release("a", books.claim("a", "w1").token, ReleaseReason.STOPPED)
    assert counted(books.census()) == {("queued", "sd15", ""): 1}
    assert counted(books.moves()) == {("queued", "sd15", ""): 2, ("running", "sd15", ""): 1}


def test_totals_stay_when_records_are_swept(redis_url: str) -> None:
    books = reaper(redis_url, keep_failed_s=0, keep_done_s=0)
    books.submit([job("a")])
    books.finish("a", books.claim("a", "w1").token, Failed({"code": "input", "message": "torn"}))
    books.reap()
    assert books.census() == []
    assert counted(books.moves())["failed", "sd15", ""] == 1


def render(books: Ledger, client: redis.Redis, name: str, took_s: float) -> None:
    """A job that ran for so long, by turning back what the ledger noted of its start."""
    token = books.claim(name, "w1").token
    client.hincrbyfloat("op:pace:since", "sd15", -took_s)
    books.finish(name, token, Done({}))


def test_a_queue_tells_its_depth_age_runners_and_rate(redis_url: str, redis_client: redis.Redis) -> None:
    books = ledger(redis_url, window=1)
    books.submit([job(name) for name in "abcd"])  # most of them have no message
    render(books, redis_client, "a", 10)
    books.claim("b", "w1")
    (queue,) = books.queues()
    assert (queue.model, queue.depth, queue.running) == ("sd15", 2, 1)
    assert queue.oldest_s is not None
    assert 0 <= queue.oldest_s < 60
    assert queue.per_s is not None
    assert 0 < queue.per_s <= 0.1  # one job, at least ten seconds
    assert queue.eta_s == queue.depth / queue.per_s


def test_a_pause_does_not_slow_a_queue_down(redis_url: str, redis_client: redis.Redis) -> None:
    books = ledger(redis_url)
    books.submit([job(name) for name in "abcd"])
    render(books, redis_client, "a", 4)
    (made,) = redis_client.keys("op:pace:[0-9]*")
    earlier = f"op:pace:{int(made.decode().rpartition(':')[2]) - 50}"
    redis_client.rename(made, earlier)  # more than eight minutes ago
    render(books, redis_client, "b", 4)
    (queue,) = books.queues()
    assert queue.per_s is not None
    assert 0.2 < queue.per_s <= 0.25  # two jobs in eight seconds


def test_jobs_that_run_together_share_their_seconds(redis_url: str, redis_client: redis.Redis) -> None:
    books = ledger(redis_url)
    books.submit([job(name) for name in "ab"])
    tokens = {name: books.claim(name, "w1").token for name in "ab"}
    redis_client.hincrbyfloat("op:pace:since", "sd15", -10)
    for name, token in tokens.items():
        books.finish(name, token, Done({}))
    (queue,) = books.queues({"sd15"})
    assert queue.per_s is not None
    assert 0.15 < queue.per_s <= 0.2
    assert not redis_client.exists("op:pace:since", "op:pace:leased:sd15")


def test_a_served_model_has_a_queue_without_jobs(redis_url: str) -> None:
    (queue,) = ledger(redis_url).queues({"sdxl"})
    assert (queue.model, queue.depth, queue.oldest_s, queue.per_s, queue.eta_s) == (
        "sdxl",
        0,
        None,
        None,
        0.0,
    )


def test_a_job_cancelled_while_it_waits_is_no_work_done(redis_url: str) -> None:
    books = ledger(redis_url)
    books.submit([job("a"), job("b")])
    books.cancel("a")
    assert books.queues()[0].per_s is None
    books.cancel("b")
    books.submit([job("c")])
    token = books.claim("c", "w1").token
    books.cancel("c")
    books.finish("c", token, Cancelled())
    assert books.queues({"sd15"})[0].per_s is not None


def places(books: Ledger, *names: str) -> list[int]:
    found = []
    for name in names:
        record = books.job(name)
        assert record is not None
        place = books.place(record)
        assert isinstance(place, Place)
        found.append(place.ahead)
    return found


def test_a_place_counts_better_classes_and_sooner_turns(redis_url: str) -> None:
    books = ledger(redis_url)
    for name, priority, owner in (("a", 5, "ann"), ("b", 5, "bob"), ("c", 0, "ann"), ("d", 9, "ann")):
        books.submit([job(name, priority=priority, owner=owner)])
    books.submit([job("x", model="sdxl", priority=0)])
    assert places(books, "c", "a", "b", "d", "x") == [0, 1, 2, 3, 0]


def test_a_job_beyond_its_owners_window_stands_behind_all_that_have_messages(redis_url: str) -> None:
    books = ledger(redis_url, window=2)
    books.submit([job(name) for name in "abcd"])
    books.submit([job("z", owner="bob")])
    assert places(books, "a", "b", "z", "c", "d") == [0, 1, 2, 3, 4]
    record = books.job("d")
    assert record is not None
    place = books.place(record)
    assert place is not None
    assert not place.has_message


def test_a_job_that_runs_has_no_place(redis_url: str) -> None:
    books = ledger(redis_url)
    books.submit([job("a")])
    before = books.job("a")
    assert before is not None
    books.claim("a", "w1")
    assert books.place(before) is None


def test_a_claim_tells_how_long_the_job_waited(redis_url: str, redis_client: redis.Redis) -> None:
    books = ledger(redis_url)
    books.submit([job("a")])
    redis_client.zincrby("op:queued:sd15", -100, "a")
    waited = books.claim("a", "w1").waited_s
    assert waited is not None
    assert 100 <= waited < 160


def test_what_is_in_quarantine_is_counted(redis_url: str, redis_client: redis.Redis) -> None:
    books = ledger(redis_url)
    assert books.quarantined() == 0
    redis_client.rpush("op:quarantine", "{}", "{}")
    assert books.quarantined() == 2


def test_who_may_only_look_sees_the_farm_also_with_a_dead_worker(
    redis_url: str, redis_client: redis.Redis
) -> None:
    looks = "looks"
    redis_client.acl_setuser(
        looks, enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-srem"]
    )
    try:
        books = ledger(redis_url)
        books.announce(worker("w1"))
        redis_client.sadd("op:workers", "dead")
        watcher = ledger(redis_url.replace("redis://", f"redis://{looks}:x@"))
        assert [each.id for each in watcher.workers()] == ["w1"]
        assert redis_client.smembers("op:workers") == {b"w1", b"dead"}
        reaper(redis_url).reap()
        assert redis_client.smembers("op:workers") == {b"w1"}
    finally:
        redis_client.acl_deluser(looks)
