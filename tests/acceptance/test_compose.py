"""The compose file's farm without containers: each service's own command, users, health and environment.

`tests/compose.py` starts them. Prometheus is real (`deploy/prometheus.sh`),
with the compose file's configuration. What only an engine can show (building the images, the GPU reservation,
a name server that names replicas) is not shown; nor is Grafana, which no registry of packages has: its
panels' queries are put to Prometheus.
"""

import json
import os
import subprocess
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

import pytest
import yaml
from PIL import Image

from overpaint_producer.children import Child
from overpaint_producer.client import Farm, Job
from overpaint_producer.services import free_ports
from overpaint_shared.ledger import TERMINAL, JobState
from overpaint_shared.settings import Settings
from tests.compose import ROOT, SCRIPTS, Compose, new_passwords
from tests.waiting import wait_until


@dataclass
class ComposeFarm(Compose):
    """With replicas of the worker, and Prometheus that is told of them."""

    scraped: list[int] = field(default_factory=list)
    """The ports of the workers that Prometheus is told of."""

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


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[ComposeFarm]:
    compose = ComposeFarm(tmp_path, new_passwords())
    try:
        yield compose
    finally:
        compose.end()


def start_services(farm: Compose) -> None:
    farm.start_redis()
    farm.start_s3()
    wait_until(lambda: farm.healthy("redis"), what="Redis' health check")
    wait_until(farm.stores, within_s=60, what="S3 takes an object")


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


def empty_panels(farm: ComposeFarm) -> dict[str, list[str]]:
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
    farm: ComposeFarm, tmp_path: Path
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


def seen_by_prometheus(farm: ComposeFarm, rendered: int) -> None:
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
