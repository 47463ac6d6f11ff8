"""SeaweedFS's own ports, tried from outside: without its keys they give, change and tell nothing.

Tried on `overpaint up`'s own S3 server and on the compose file's, on every port that listens.
"""

import json
import os
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError

from overpaint_producer import services, weed_security
from overpaint_producer.doctor import check_store, store_facts
from overpaint_producer.doctor.findings import Level
from overpaint_producer.services import S3Service, find_weed, start_s3
from overpaint_producer.weed_security import CERTIFICATE, CONFIG, KEY, write_security
from overpaint_shared.errors import ServiceError
from overpaint_shared.settings import Settings
from tests.shipped import Shipped

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
SECRET = b"a picture that nobody but the farm may see" * 100
NOBODY = 65534
SHELL_S = 5.0
"""`weed shell` needs 0.4 s; refused, it tries for ever."""
ATTACK = (
    "fs.ls /buckets\ns3.configure -user mallory -access_key evil -secret_key evilevil -actions Admin -apply\n"
)


@dataclass
class Served:
    """An S3 server, as its owner knows it."""

    pid: int
    ports: dict[str, int]
    keys: Path
    bucket: str
    client: Any

    @property
    def listening(self) -> list[int]:
        """Every port that it listens on."""
        found = psutil.Process(self.pid).net_connections(kind="inet")
        return sorted(each.laddr.port for each in found if each.status == psutil.CONN_LISTEN)

    def shell(self, commands: str, *options: str, user: int | None = None) -> str:
        """What `weed shell` says; TimeoutExpired where it is not let in."""
        where = [
            f"-{part}=127.0.0.1:{self.ports[f'{part}.port']}.{self.grpc(part)}"
            for part in ("master", "filer")
        ]
        done = subprocess.run(
            [find_weed(), *options, "shell", *where],
            input=commands,
            text=True,
            capture_output=True,
            timeout=SHELL_S,
            cwd="/",
            env={"HOME": "/"},
            user=user,
            check=False,
        )
        return done.stdout

    def grpc(self, part: str) -> int:
        """A part's gRPC port."""
        return self.ports[f"{part}.port.grpc"]


@pytest.fixture(params=["up", "compose"])
def served(request: pytest.FixtureRequest) -> Served:
    """Each of the servers that are shipped."""
    if request.param == "up":
        up: S3Service = request.getfixturevalue("s3_server")
        client = request.getfixturevalue("s3_client")
        return Served(up.child.process.pid, up.ports, up.dir, up.bucket, client)
    shipped: Shipped = request.getfixturevalue("shipped")
    s3 = shipped.s3
    assert s3.child is not None
    keys, bucket = s3.compose.folder / "keys", s3.settings["s3_bucket"]
    return Served(s3.child.process.pid, s3.compose.ports, keys, bucket, s3.client())


def stranger(certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """TLS without a certificate, or with this one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if certificate:
        context.load_cert_chain(certificate, key)
    return context


def speaks_grpc(port: int, context: ssl.SSLContext | None = None) -> bool:
    """Whether the port goes on with HTTP/2, as gRPC does, with whoever calls."""
    with (
        suppress(OSError),
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        context.wrap_socket(plain) if context else plain as held,
    ):
        held.sendall(PREFACE)
        return held.recv(9)[3:4] == b"\x04"  # a frame of settings
    return False


def http(method: str, port: int, path: str) -> tuple[int, bytes]:
    """The status and the body; 0 where the port does not speak HTTP."""
    body = b"overwritten" if method in {"POST", "PUT"} else None
    request = Request(f"http://127.0.0.1:{port}/{path}", data=body, method=method)
    try:
        with urlopen(request, timeout=5) as answer:  # noqa: S310
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()
    except (URLError, OSError):
        return 0, b""


@pytest.fixture
def stored(served: Served) -> Iterator[str]:
    """A picture's number in its volume, told by `weed shell` to whoever has the keys."""
    served.client.put_object(Bucket=served.bucket, Key="secret/picture", Body=SECRET)
    told = served.shell(
        f"fs.meta.cat /buckets/{served.bucket}/secret/picture\n", f"-config_dir={served.keys}"
    )
    found = re.search(r'"fileId":\s*"([^"]+)"', told)
    assert found, told
    yield found[1]
    served.client.delete_object(Bucket=served.bucket, Key="secret/picture")


def test_a_grpc_port_goes_on_with_nobody_who_lacks_its_certificate(served: Served, tmp_path: Path) -> None:
    write_security(tmp_path)  # another farm's
    parts = ("master", "volume", "filer", "s3", "admin")
    own, other = (stranger(folder / CERTIFICATE, folder / KEY) for folder in (served.keys, tmp_path))
    assert {served.grpc(part) for part in parts} <= set(served.listening)
    assert all(speaks_grpc(served.grpc(part), own) for part in parts), "the check can tell"
    for port in served.listening:
        for context in (None, stranger(), other):
            assert not speaks_grpc(port, context), (port, context)


def test_weed_shell_without_the_keys_neither_lists_the_buckets_nor_makes_an_administrator(
    served: Served,
) -> None:
    user = NOBODY if os.geteuid() == 0 else None
    listed = served.shell("fs.ls /buckets\n", f"-config_dir={served.keys}")
    assert served.bucket in listed, "whoever has the keys sees them"
    with pytest.raises(subprocess.TimeoutExpired) as refused:
        served.shell(ATTACK, user=user)
    assert not refused.value.stdout
    evil = boto3.client(
        "s3",
        endpoint_url=served.client.meta.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id="evil",
        aws_secret_access_key="evilevil",
    )
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        evil.list_objects_v2(Bucket=served.bucket)


def test_no_http_port_gives_changes_or_deletes_a_picture_without_a_key(served: Served, stored: str) -> None:
    bucket = served.bucket
    paths = [stored, f"{bucket}/secret/picture", f"buckets/{bucket}/secret/picture", f"buckets/{bucket}/"]
    orders = [
        f"dir/assign?collection={bucket}",
        f"col/delete?collection={bucket}",
        f"vol/grow?collection={bucket}",
    ]
    assert http("GET", served.ports["volume.port"], stored)[0] == 401, "it asks for a signature"
    for port in served.listening:
        for method in ("GET", "POST", "PUT", "DELETE"):
            for path in (*paths, *orders):
                status, body = http(method, port, path)
                assert not 200 <= status < 300, (method, port, path)
                assert SECRET not in body
    read = served.client.get_object(Bucket=bucket, Key="secret/picture")
    assert read["Body"].read() == SECRET


def test_the_keys_outlive_a_restart_and_only_their_owner_reads_them(served: Served) -> None:
    before = {path.name: path.read_bytes() for path in served.keys.iterdir() if path.is_file()}
    write_security(served.keys)
    assert {path.name: path.read_bytes() for path in served.keys.iterdir() if path.is_file()} == before
    for name in ("security.toml", KEY):
        assert (served.keys / name).stat().st_mode & 0o077 == 0, name


@pytest.mark.parametrize("how", ["damaged", "another's", "moved", "half written"])
def test_up_starts_no_s3_server_whose_keys_cannot_be_used(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    folder.mkdir()
    write_security(folder)
    if how == "damaged":
        (folder / KEY).write_text("no key")
    elif how == "another's":
        (tmp_path / "other").mkdir()
        write_security(tmp_path / "other")
        (tmp_path / "other" / KEY).replace(folder / KEY)
    elif how == "moved":
        folder = folder.rename(tmp_path / "s3-moved")
    else:
        (folder / CONFIG).write_text((folder / CONFIG).read_text().partition("[grpc.s3]")[0])
    with pytest.raises(ServiceError, match="keys cannot be used by the user") as refused:
        start_s3(folder)
    assert f"delete {CONFIG}" in str(refused.value.fix)
    (folder / CONFIG).unlink()
    start_s3(folder).kill()  # as the fix says


def test_keys_that_the_servers_user_cannot_read_are_refused_as_compose_makes_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    is_root = os.geteuid() == 0
    user = f"{NOBODY}:{NOBODY}" if is_root else f"{os.geteuid()}:{os.getegid()}"
    made = ["weed_security", str(tmp_path), user]
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    assert weed_security.main(made) == 0
    locked = tmp_path if is_root else tmp_path / KEY
    locked.chmod(0o700 if is_root else 0)
    assert weed_security.main(made) == 1
    assert f"cannot be used by the user {user.partition(':')[0]}" in capfd.readouterr().err


def test_a_server_that_fell_back_to_plain_grpc_is_stopped_and_the_doctor_calls_it_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "write_security", lambda _: None)
    monkeypatch.setattr(services, "check_security", lambda _: None)
    folder = tmp_path / "overpaint-data" / "s3"
    with pytest.raises(ServiceError, match="ask for no certificate; it was stopped"):
        start_s3(folder)
    monkeypatch.setattr(services, "_refuse_open_ports", lambda _: None)
    monkeypatch.chdir(tmp_path)
    open_one = start_s3(folder)
    try:
        names = ("endpoint_url", "access_key", "secret_key", "bucket")
        given = {f"s3_{name}": getattr(open_one, name) for name in names}
        facts = store_facts.gather(Settings.load(**given))
        parts = ("master", "volume", "filer", "s3", "admin")
        assert {open_one.ports[f"{part}.port.grpc"] for part in parts} <= set(facts.open_grpc or ())
        (found,) = check_store.strangers(facts)
        assert (found.check, found.level) == ("s3.grpc", Level.WRONG)
    finally:
        open_one.kill()


def test_the_doctor_finds_the_ports_of_a_seaweedfs_in_order(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "overpaint-data" / "s3"
    data.mkdir(parents=True)
    port = urlsplit(served.client.meta.endpoint_url).port
    (data / "ports.json").write_text(json.dumps(served.ports | {"s3.port": port}))
    monkeypatch.chdir(tmp_path)
    tried: list[int] = []
    opened = store_facts.open_to_strangers
    monkeypatch.setattr(
        store_facts, "open_to_strangers", lambda host, ports: tried.extend(ports) or opened(host, ports)
    )
    credentials = served.client._request_signer._credentials
    settings = Settings.load(
        s3_endpoint_url=served.client.meta.endpoint_url,
        s3_bucket=served.bucket,
        s3_access_key=credentials.access_key,
        s3_secret_key=credentials.secret_key,
    )
    facts = store_facts.gather(settings)
    assert {served.grpc(part) for part in ("master", "volume", "filer", "s3", "admin")} <= set(tried)
    assert facts.open_grpc == ()
    assert [found.level for found in check_store.strangers(facts)] == [Level.OK]
