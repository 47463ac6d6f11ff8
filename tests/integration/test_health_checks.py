"""The compose file's health checks fail when they should: while data is loaded, and when a server hangs."""

import pytest
import redis

from tests.shipped import Shipped, ShippedRedis
from tests.waiting import wait_until


def test_redis_is_not_healthy_before_it_has_loaded_its_data(own_redis: Shipped) -> None:
    server = own_redis.redis
    assert server.compose.healthy("redis")
    with server.client() as client:
        for number in range(3000):
            client.set(f"op:job:{number}", "x" * 100)
        client.bgrewriteaof()
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
    server.stop()
    slow = ("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024")
    server.child = server.compose.start("redis", "--port", str(server.port), "--bind", "127.0.0.1", *slow)
    wait_until(lambda: loads(server), what="Redis answers while it loads")
    assert not server.compose.healthy("redis")
    assert loads(server), "it still did"
    wait_until(lambda: server.compose.healthy("redis"), within_s=30)
    assert not loads(server)


def loads(server: ShippedRedis) -> bool:
    try:
        with server.client(socket_timeout=2) as client:
            return not client.ping()
    except redis.BusyLoadingError:
        return True
    except redis.RedisError:
        return False


@pytest.mark.parametrize("name", ["redis", "s3"])
def test_a_server_that_hangs_is_not_healthy(own_servers: Shipped, name: str) -> None:
    server = getattr(own_servers, name)
    wait_until(lambda: server.compose.healthy(name))
    server.freeze()
    try:
        assert not server.compose.healthy(name)
    finally:
        server.thaw()
    wait_until(lambda: server.compose.healthy(name))


def test_redis_stays_healthy_when_its_password_was_changed_while_it_ran(own_redis: Shipped) -> None:
    server = own_redis.redis
    with server.client() as client:
        client.acl_setuser(
            "monitor", enabled=True, passwords=["+another-password-entirely"], reset_passwords=True
        )
    assert server.compose.healthy("redis")
