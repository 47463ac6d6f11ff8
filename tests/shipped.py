"""A farm exactly as shipped, as processes: its servers as compose starts them, its workers as systemd does.

Redis is Valkey 8, started by `deploy/valkey/start.sh` with its configuration, its four users and passwords
of `deploy/new-env`. Workers have the command line of `deploy/systemd/overpaint-worker@.service` and the
environment of `deploy/worker-env`. They render on the CPU, most with the fake engine.

`shipped` is a farm on servers that all tests share, emptied for each. A test that ends, freezes or breaks a
server has its own: `own_redis` with the shared S3, `own_servers` with both.
"""

import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
import redis

from overpaint_producer.children import Child
from overpaint_shared.settings import Settings
from overpaint_worker.registry import SHIPPED
from tests.compose import ROOT, Compose, new_passwords, read_unit, worker_env
from tests.waiting import wait_until
from tests.workers import TestFarm

DEPLOYED = ROOT / "deploy" / "valkey"
ROLES = ("producer", "worker", "monitor", "operator")
QUICK = {
    "lease_s": 3.0,
    "renew_s": 0.5,
    "reap_s": 0.3,
    "reap_grace_s": 1.0,
    "worker_ttl_s": 3.0,
    "unable_after_s": 1.0,
}
"""Loss is noticed within seconds."""
UNIT = ROOT / "deploy" / "systemd" / "overpaint-worker@.service"


class Server:
    """A server of the compose file, which a test may end, freeze and start again in the same place."""

    def __init__(self, folder: Path, passwords: dict[str, str]) -> None:
        self.compose = Compose(folder, passwords)
        self.child: Child | None = None

    @property
    def folder(self) -> Path:
        """Where its data is."""
        return self.compose.folder / "data"

    @property
    def log(self) -> str:
        """What its newest process has said."""
        assert self.child is not None
        return self.child.log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether its process runs (or is frozen)."""
        return self.child is not None and self.child.alive

    def launch(self) -> Child:
        """Start its process."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether it serves."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.child = self.launch()
        wait_until(lambda: self.answers() or not self.alive, within_s=60, what=f"{self.child.name} serves")
        assert self.alive, self.log

    def stop(self) -> int:
        """SIGTERM, as service managers do, and wait for its end; the exit status."""
        assert self.child is not None
        self.child.process.terminate()
        return self.child.process.wait(30)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self.child is not None
        self.child.kill()

    def freeze(self) -> None:
        """It accepts connections and never answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Nothing of it is left."""
        self.compose.end()

    def _signal(self, number: signal.Signals) -> None:
        assert self.child is not None
        os.killpg(self.child.process.pid, number)


class ShippedRedis(Server):
    """The compose file's Redis. `program`: another server, as Redis 7 or Valkey of another version."""

    def __init__(self, folder: Path, passwords: dict[str, str], program: Path | str | None = None) -> None:
        super().__init__(folder, passwords)
        self.program = program

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.compose.ports["redis"]

    @property
    def given(self) -> dict[str, str]:
        """What `start.sh` is given in the environment, to change before a start."""
        found: dict[str, str] = self.compose.config["services"]["redis"]["environment"]
        return found

    def password(self, role: str) -> str:
        """A role's."""
        return self.compose.environment[f"OVERPAINT_REDIS_{role.upper()}_PASSWORD"]

    def url(self, role: str) -> str:
        """Its address for a role, password included."""
        return f"redis://{role}:{self.password(role)}@127.0.0.1:{self.port}/0"

    def client(self, role: str = "operator", **options: Any) -> "redis.Redis":
        """A client with a role's rights."""
        quick = {"socket_timeout": 10, "socket_connect_timeout": 10, "decode_responses": True}
        return redis.Redis.from_url(self.url(role), **(quick | options))

    def denied(self) -> set[str]:
        """What its users were refused since it started or was cleared: user, command or key."""
        with self.client() as client:
            return {f"{entry['username']}: {entry['object']}" for entry in client.acl_log()}

    def clear(self) -> None:
        """Delete all keys, and forget what users were refused."""
        with self.client() as client:
            client.flushall()
            client.acl_log_reset()

    def launch(self) -> Child:
        """As the compose file does, with another program where one is given."""
        if self.program is not None:
            self.compose.replaced["valkey-server"] = str(self.program)
        return self.compose.start_redis()

    def answers(self) -> bool:
        """Whether it has loaded its data and knows its operator."""
        with suppress(redis.RedisError), self.client(socket_timeout=2) as client:
            return bool(client.ping())
        return False


class ShippedS3(Server):
    """The compose file's SeaweedFS."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that name it."""
        given = self.compose.env("cli")
        names = ("s3_endpoint_url", "s3_bucket", "s3_region", "s3_access_key", "s3_secret_key")
        return {name: given[f"OVERPAINT_{name.upper()}"] for name in names}

    def client(self) -> Any:
        """A plain boto3 client, to look past the farm's own store."""
        given = self.settings
        return boto3.client(
            "s3",
            endpoint_url=given["s3_endpoint_url"],
            region_name=given["s3_region"],
            aws_access_key_id=given["s3_access_key"],
            aws_secret_access_key=given["s3_secret_key"],
        )

    def clear(self) -> None:
        """Delete all objects."""
        client = self.client()
        bucket = self.settings["s3_bucket"]
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for found in page.get("Contents", []):
                client.delete_object(Bucket=bucket, Key=found["Key"])
        client.close()

    def launch(self) -> Child:
        """As the compose file does."""
        return self.compose.start_s3()

    def answers(self) -> bool:
        """Whether it takes an object."""
        return self.compose.stores()


@dataclass
class Shipped:
    """The servers of one farm."""

    redis: ShippedRedis
    s3: ShippedS3

    def settings(self, role: str, **changes: Any) -> Settings:
        """A role's settings; loss is noticed within seconds."""
        return Settings.load(redis_url=self.redis.url(role), **(self.s3.settings | QUICK | changes))

    def farm(self, folder: Path, **changes: Any) -> "ShippedFarm":
        """A farm whose own side is a producer and whose workers are started as workers are."""
        producer, worker = (self.settings(role, **changes) for role in ("producer", "worker"))
        return ShippedFarm(producer, folder, worker, servers=self)


@dataclass
class ShippedFarm(TestFarm):
    """Workers as the systemd unit starts them."""

    __test__ = False

    servers: Shipped | None = None
    unit: dict[str, str] = field(default_factory=lambda: dict(read_unit(UNIT)["Service"]))

    @property
    def on(self) -> Shipped:
        """The servers."""
        assert self.servers is not None
        return self.servers

    def surroundings(self) -> dict[str, str]:
        """What the unit gives: nothing of the tests' own environment but where programs are."""
        given = worker_env(self.folder, "127.0.0.1", self.on.redis.compose.environment)
        lines = [line.partition("=") for line in given.splitlines()]
        unit = dict(word.split("=", 1) for word in shlex.split(self.unit["Environment"]))
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        return kept | {name: value for name, _, value in lines} | unit | {"HOME": str(self.folder)}

    def given(self, models: Sequence[str], registry: Path | None, **options: Any) -> dict[str, Any]:
        """The unit's command line, then this test's options: of an option given twice the last one counts."""
        _, *argv = shlex.split(self.unit["ExecStart"].replace("%i", str(len(self.workers))))
        argv[argv.index("--device") + 1] = "cpu"
        argv[argv.index("--hashes") + 1] = str(self.folder / "hashes.json")
        argv[argv.index("--metrics-port") + 1] = "0"
        fixed = {name: options.pop(name) for name in ("answer_s", "stage_s") if name in options}
        for name, value in ({"models": ",".join(models)} | options).items():
            argv += [f"--{name.removesuffix('_s').replace('_', '-')}", str(value)]
        return {"argv": [*argv, "--registry", str(registry or self._names(models))], **fixed}

    def _names(self, models: Sequence[str]) -> Path:
        """A registry of names alone, for the fake engine."""
        path = self.folder / f"models-{len(self.workers)}.toml"
        path.write_text("".join(f'[models."{name}"]\nfamily = "sd"\npath = "{name}"\n' for name in models))
        return path


MINIATURES = SHIPPED
"""The registry for workers with the real engine; its models are `mini` and `mini-inpaint`."""


@pytest.fixture(scope="session")
def shipped_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shipped]:
    """Servers of this test run's own. What they hold stays from test to test: see `shipped`."""
    passwords = new_passwords()
    made = Shipped(
        ShippedRedis(tmp_path_factory.mktemp("shipped-redis"), passwords),
        ShippedS3(tmp_path_factory.mktemp("shipped-s3"), passwords),
    )
    yield from _served(made, made.redis, made.s3)


@pytest.fixture
def shipped(shipped_servers: Shipped) -> Shipped:
    """The shared servers, empty. Do not end, freeze or configure them."""
    shipped_servers.redis.clear()
    shipped_servers.s3.clear()
    return shipped_servers


@pytest.fixture
def own_redis(shipped_servers: Shipped, tmp_path: Path) -> Iterator[Shipped]:
    """A Redis that the test may break, and the shared S3, empty."""
    shipped_servers.s3.clear()
    made = Shipped(
        ShippedRedis(tmp_path / "redis", shipped_servers.redis.compose.environment), shipped_servers.s3
    )
    yield from _served(made, made.redis)


@pytest.fixture
def apart(shipped_servers: Shipped, tmp_path: Path) -> Iterator[Shipped]:
    """A Redis that is not started yet, and the shared S3."""
    shipped_servers.s3.clear()
    made = ShippedRedis(tmp_path / "redis", shipped_servers.redis.compose.environment)
    yield Shipped(made, shipped_servers.s3)
    made.end()


@pytest.fixture
def own_servers(tmp_path: Path) -> Iterator[Shipped]:
    """Servers that the test may break."""
    passwords = new_passwords()
    made = Shipped(ShippedRedis(tmp_path / "redis", passwords), ShippedS3(tmp_path / "s3", passwords))
    yield from _served(made, made.redis, made.s3)


@pytest.fixture
def shipped_farm(shipped: Shipped, tmp_path: Path) -> Iterator[ShippedFarm]:
    """A farm on the shared servers."""
    made = shipped.farm(tmp_path)
    yield made
    made.end()


def _served(made: Shipped, *servers: Server) -> Iterator[Shipped]:
    try:
        for server in servers:
            server.start()
        yield made
    finally:
        for server in servers:
            server.end()
