"""Celery messages on a real Redis: where they go, who reads them, and what happens when it is away."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.contrib.testing.worker import start_worker
from kombu.exceptions import BatchPublishError
from kombu.transport.redis import PublishBatch

from overpaint_producer.services import start_redis
from overpaint_shared.errors import LedgerFull, LedgerUnreachable
from overpaint_shared.ledger import Wakeup
from overpaint_shared.queues import (
    RENDER_TASK,
    STAMP_HEADER,
    list_name,
    make_app,
    model_of,
    priority_step,
    publish,
    queue_name,
)
from tests.waiting import wait_until


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    """A producer's app."""
    made = make_app(redis_url)
    yield made
    made.close()


def due(
    job_id: str, priority: int = 3, model: str = "sd15", *, front: bool = False, stamp: float = 1.5
) -> Wakeup:
    return Wakeup(job_id, model, priority, f"{model} img2img {job_id}", stamp, front)


def waiting(client: redis.Redis, model: str = "sd15", priority: int = 3) -> list[dict[str, Any]]:
    """The messages of one list, the next one first."""
    return [json.loads(raw) for raw in client.lrange(list_name(model, priority), 0, -1)][::-1]


def ids(messages: list[dict[str, Any]]) -> list[str]:
    return [message["headers"]["id"] for message in messages]


def test_queues_and_models_name_each_other():
    assert model_of(queue_name("sd-1.5")) == "sd-1.5"
    assert model_of("celery") is None


def test_ten_priorities_fall_into_four_classes():
    assert [priority_step(priority) for priority in range(10)] == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]


def test_both_sides_have_the_same_steps_and_read_nothing_but_json(redis_url: str):
    producer, worker = make_app(redis_url), make_app(redis_url, ["sd15", "sdxl"])
    assert producer.conf.broker_transport_options == worker.conf.broker_transport_options
    assert worker.conf.accept_content == ["json"]
    assert worker.conf.result_backend is None
    assert [queue.name for queue in worker.conf.task_queues] == ["m.sd15", "m.sdxl"]


def test_a_message_holds_the_id_the_title_and_the_stamp_and_no_more(app: Celery, redis_client: redis.Redis):
    assert publish(app, [due("a")]) == 1
    (message,) = waiting(redis_client)
    headers = message["headers"]
    assert (headers["id"], headers["task"], headers[STAMP_HEADER]) == ("a", RENDER_TASK, 1.5)
    assert headers["argsrepr"] == "sd15 img2img a"
    assert len(json.dumps(message)) < 1200


@pytest.mark.parametrize("priority", [0, 3, 6, 9])
def test_each_class_has_its_own_list(app: Celery, redis_client: redis.Redis, priority: int):
    publish(app, [due("a", priority)])
    assert ids(waiting(redis_client, priority=priority)) == ["a"]
    assert len(redis_client.keys("m.*")) == 1


def test_messages_wait_in_the_order_in_which_they_were_due_and_returned_jobs_come_first(
    app: Celery, redis_client: redis.Redis
):
    publish(app, [due("a"), due("back1", front=True), due("b"), due("back2", front=True)])
    assert ids(waiting(redis_client)) == ["back1", "back2", "a", "b"]
    assert STAMP_HEADER not in waiting(redis_client)[0]["headers"]


def test_many_messages_go_out_in_few_round_trips(
    app: Celery, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
):
    flushes: list[int] = []
    flush = PublishBatch.flush

    def counted(batch: PublishBatch) -> None:
        flushes.append(batch._buffered)
        flush(batch)

    monkeypatch.setattr(PublishBatch, "flush", counted)
    assert publish(app, [due(f"j{number}") for number in range(1000)]) == 1000
    assert redis_client.llen(list_name("sd15", 3)) == 1000
    assert max(flushes) == 200


def test_a_worker_runs_each_message_once_with_its_id_and_title(
    app: Celery, redis_url: str, redis_client: redis.Redis
):
    worker = make_app(redis_url, ["sd15", "sdxl"])
    seen: list[tuple[str, str, str]] = []
    all_seen = threading.Event()

    @worker.task(name=RENDER_TASK, bind=True)
    def render(self, job_id: str) -> None:
        seen.append((job_id, self.request.id, self.request.argsrepr))
        if len(seen) == 5:
            all_seen.set()

    publish(
        app,
        [due("late", 9), due("a"), due("front", front=True), due("other", model="sdxl"), due("urgent", 0)],
    )
    with start_worker(worker, pool="threads", concurrency=1, perform_ping_check=False, shutdown_timeout=20):
        assert all_seen.wait(30), seen
        wait_until(lambda: not redis_client.exists("unacked"), what="all are acknowledged")
    worker.close()
    assert {(job, task) for job, task, _ in seen} == {
        (n, n) for n in ("late", "a", "front", "other", "urgent")
    }
    assert ("front", "front", "sd15 img2img front") in seen
    order = [job for job, _, _ in seen]
    assert order[0] == "urgent"
    assert order.index("front") < order.index("a") < order.index("late")
    assert not redis_client.keys("m.*")


def test_a_batch_that_fails_is_sent_one_by_one(
    app: Celery, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
):
    def uncertain(batch: PublishBatch) -> None:
        raise BatchPublishError("delivery is uncertain")

    monkeypatch.setattr(PublishBatch, "flush", uncertain)
    assert publish(app, [due("a"), due("front", front=True), due("b")]) == 3
    assert ids(waiting(redis_client)) == ["front", "a", "b"]


def test_a_broker_that_is_away_is_a_typed_error_without_the_password():
    away = make_app("redis://user:secret@127.0.0.1:1/0")
    with pytest.raises(LedgerUnreachable) as caught:
        publish(away, [due("a")])
    away.close()
    assert "secret" not in str(caught.value)
    assert "127.0.0.1:1" in str(caught.value)


@pytest.mark.parametrize("front", [False, True], ids=["at the back", "at the front"])
def test_publishing_survives_a_restart_of_the_broker(tmp_path: Path, *, front: bool):
    server = start_redis(tmp_path)
    app = make_app(server.url)
    try:
        publish(app, [due("a", front=front)])
        server.kill()
        with pytest.raises(LedgerUnreachable):
            publish(app, [due("b", front=front)])
        server = start_redis(tmp_path)
        assert publish(app, [due("c", front=front)]) == 1
        with redis.Redis.from_url(server.url) as client:
            assert "c" in ids(waiting(client))
    finally:
        app.close()
        server.stop()


@pytest.mark.parametrize("front", [False, True], ids=["at the back", "at the front"])
def test_a_full_broker_is_a_typed_error(app: Celery, redis_client: redis.Redis, *, front: bool):
    redis_client.config_set("maxmemory", "1")
    try:
        with pytest.raises(LedgerFull, match="maxmemory"):
            publish(app, [due("a", front=front)])
    finally:
        redis_client.config_set("maxmemory", "0")


def test_an_unconfigured_queue_is_not_made(app: Celery, redis_client: redis.Redis):
    with pytest.raises(Exception, match="nowhere"):
        app.send_task(RENDER_TASK, ("a",), queue="nowhere")
    assert not redis_client.keys("nowhere*")
