"""The Redis users as shipped: each role does its work with the rights it has, and is refused nothing."""

import json
import signal
import subprocess
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from overpaint_producer import children
from overpaint_producer.client import Farm
from overpaint_producer.services import free_ports
from overpaint_shared.errors import LedgerUnreachable
from overpaint_shared.ledger import JobState
from tests.acceptance.commands import environment
from tests.shipped import ROLES, Shipped, ShippedFarm
from tests.waiting import wait_until
from tests.workers import OWNER, REPOSITORY


def asking(url: str, user: str, password: str) -> Callable[[str], Any]:
    """Gets JSON from Flower; None while it does not answer or has nothing to say."""
    token = b64encode(f"{user}:{password}".encode()).decode()

    def ask(path: str) -> Any:
        request = urllib.request.Request(url + path, headers={"Authorization": f"Basic {token}"})  # noqa: S310
        with suppress(OSError), urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return json.load(answer) or None
        return None

    return ask


def test_producer_and_worker_do_all_their_work_and_are_refused_nothing(
    shipped: Shipped, shipped_farm: ShippedFarm
) -> None:
    farm = shipped_farm
    first = farm.start(("tiny", "other")).ready()
    with Farm(farm.settings) as client, farm.ledger.events(OWNER) as events:
        done, failed, cancelled = farm.submit(farm.spec(), farm.spec(do="fail"), farm.long())
        farm.until(done, JobState.DONE)
        assert next(iter(events)).job_id in {done, failed, cancelled}
        farm.until(failed, JobState.FAILED)
        client.job(failed).replay()
        farm.until(failed, JobState.FAILED)
        farm.stepping(cancelled)
        client.job(cancelled).cancel()
        farm.until(cancelled, JobState.CANCELLED)
        (crashed,) = farm.submit(farm.spec(do="kill", at=2))
        farm.until(crashed, JobState.DEAD)
        assert len(client.ledger.jobs(owner=OWNER)) == 4
        assert client.workers()[0].models == ("tiny", "other")
        assert farm.ledger.depth() == 0

    lost, *others = farm.submit(farm.long(), farm.spec("other"), farm.spec("other"))
    farm.stepping(lost)
    first.kill_group()  # its lease runs out; the second worker's reaper takes the job back
    second = farm.start(("tiny", "other"), grace_s=0).ready()
    farm.all_ended(others)
    wait_until(lambda: farm.job(lost).attempt == 2, what="the lost job runs again")
    farm.stepping(lost)
    second.terminate()  # gives the job back
    assert second.wait() == 0
    assert farm.job(lost).state is JobState.QUEUED
    assert farm.ledger.cancel(lost).state is JobState.CANCELLED
    assert shipped.redis.denied() == set()


def test_an_item_that_is_no_message_is_set_aside_under_the_workers_rights(
    shipped: Shipped, shipped_farm: ShippedFarm
) -> None:
    farm = shipped_farm
    worker = farm.start().ready()
    with shipped.redis.client("operator") as client:
        client.lpush("m.tiny", "no message")
        worker.until("message.quarantined")
        wait_until(lambda: client.llen("op:quarantine") == 1, what="the item is kept")
    assert shipped.redis.denied() == set()


def test_flower_sees_queues_and_workers_and_may_change_no_job(
    shipped: Shipped, shipped_farm: ShippedFarm
) -> None:
    farm = shipped_farm
    farm.start().ready()
    (port,) = free_ports(1)
    given = {"OVERPAINT_REDIS_URL": shipped.redis.url("monitor"), "FLOWER_BASIC_AUTH": "a:b"}
    flower = subprocess.Popen(
        children.guarded(
            [sys.executable, "-m", "celery", "--app=overpaint_producer.monitor", "flower",
             f"--port={port}", "--address=127.0.0.1", "--read_only=True"]
        ),
        cwd=REPOSITORY,
        env=environment(more=given),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        auth = asking(f"http://127.0.0.1:{port}", "a", "b")
        seen = wait_until(lambda: auth("/api/workers?refresh=1"), within_s=60, what="Flower knows the worker")
        (worker,) = seen.values()
        assert worker["registered"] == ["overpaint.render"], "the worker answered Flower's question"
        (job_id,) = farm.submit(farm.spec())
        farm.until(job_id, JobState.DONE)
        wait_until(lambda: (auth("/api/tasks") or {}).get(job_id, {}).get("state") == "SUCCESS")
        assert auth("/api/queues/length")["active_queues"]
    finally:
        flower.send_signal(signal.SIGTERM)
        flower.wait()
    assert shipped.redis.denied() == set()


def test_what_a_role_may_not_do_is_told_with_the_page_that_lists_its_rights(
    shipped: Shipped,
) -> None:
    with (
        Farm(shipped.settings("monitor")) as farm,
        pytest.raises(LedgerUnreachable, match="denies") as refused,
    ):
        farm.ledger.cancel("a")
    assert refused.value.fix is not None
    (page,) = [word for word in refused.value.fix.split() if word.endswith(".md")]
    said = (REPOSITORY / page).read_text()
    assert all(f"`{role}`" in said for role in ROLES)
