"""What a group of many waiting jobs costs those who stop, ask and follow it.

    python bench/crowd.py [--jobs 20000] [--json]

Starts a Redis of its own and submits the jobs as one group. Measured, each as the command line does it:

    status      all records of the group, as `overpaint status --group` reads them
    watch       reads of Redis and share of a core, each second, while all of them wait
                and fifty events a second tell of another job
    cancel      from the first call until all are cancelled; messages that are then without work
    reaper      a round while the crowd waits, with the CPU of Redis; when a lost message is noticed
"""

import argparse
import json
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import redis

from overpaint_producer.cli.jobs import batches
from overpaint_producer.client import Farm
from overpaint_producer.services import start_redis
from overpaint_producer.submitting import wake
from overpaint_shared.job import parse_job
from overpaint_shared.ledger import Ledger, Submission
from overpaint_shared.ledger.events import channel
from overpaint_shared.queues import list_name
from overpaint_shared.settings import Settings

GROUP = "crowd"
OWNER = "default"
WATCHED_S = 20.0
JOB = {
    "version": 1,
    "model": "sd15",
    "source": {"image": "sha256:" + "5e" * 32},
    "method": {"kind": "img2img"},
    "prompt": "a watercolour of a red hat on a wooden table, soft light from the left, fine paper grain",
    "sampling": {"seed": 1234567890},
}


@dataclass(frozen=True)
class Figures:
    """What was measured."""

    jobs: int
    status_s: float
    watch_reads_per_s: float
    watch_cpu_share: float
    cancel_s: float
    messages_left: int
    messages_after_a_round: int
    reaper_round_ms: float
    reaper_redis_cpu_ms: float
    lost_noticed_s: float


def submit(farm: Farm, jobs: int) -> None:
    spec = parse_job(JOB)
    text, features = spec.to_json(), spec.features()
    answers = farm.ledger.submit(
        Submission(
            id=uuid.uuid4().hex[:16], owner=OWNER, spec_json=text, model=spec.model, group=GROUP,
            title="sd15 img2img", features=features,
        )
        for _ in range(jobs)
    )  # fmt: skip
    wake(farm.app, [due for answer in answers for due in answer.wakeups])


def reads(client: redis.Redis) -> int:
    """How often a record was read since the start."""
    stats = client.info("commandstats")
    return sum(int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("hgetall", "hmget", "get"))


def redis_cpu_s(client: redis.Redis) -> float:
    cpu = client.info("cpu")
    return float(cpu["used_cpu_user_main_thread"] + cpu["used_cpu_sys_main_thread"])


@contextmanager
def timed() -> Iterator[list[float]]:
    spent = [0.0]
    start = time.perf_counter()
    yield spent
    spent[0] = time.perf_counter() - start


def status(farm: Farm) -> float:
    with timed() as spent:
        for names in batches(farm.group(GROUP)):
            farm.ledger.records(names)
    return spent[0]


def watch(farm: Farm, client: redis.Redis) -> tuple[float, float]:
    ready, begun = threading.Event(), [0, 0.0, 0.0]
    ids = farm.group(GROUP)

    def follow() -> None:
        try:
            for number, _ in enumerate(farm.follow(ids, timeout=WATCHED_S + 15), start=1):
                if number == len(ids):
                    ready.set()
        except TimeoutError:
            return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    ready.wait()
    begun = [reads(client), time.process_time(), time.perf_counter()]
    tell_until(client, time.perf_counter() + WATCHED_S)
    wall = time.perf_counter() - begun[2]
    result = (reads(client) - begun[0]) / wall, (time.process_time() - begun[1]) / wall
    thread.join()
    return result


def tell_until(client: redis.Redis, end: float) -> None:
    """Events of another job, fifty a second, as a farm that renders makes them."""
    event = json.dumps({"job": "another", "state": "running", "attempt": 1, "stage": "denoise"})
    while time.perf_counter() < end:
        client.publish(channel(OWNER), event)
        time.sleep(0.02)


def lose_one(reaper: Ledger, client: redis.Redis) -> float:
    """Seconds from the loss of the last message of the list until the reaper names its job."""
    name = list_name("sd15", 5)
    reaper.reap()
    raw = client.lpop(name)
    lost = json.loads(raw)["headers"]["id"]
    start = time.perf_counter()
    while lost not in reaper.reap().stale:
        time.sleep(3.0)
        if time.perf_counter() - start > 120:
            return float("nan")
    return time.perf_counter() - start


def measure(jobs: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        server = start_redis(Path(folder))
        try:
            settings = Settings.load(redis_url=server.url, s3_bucket="none")
            with Farm(settings) as farm, redis.Redis.from_url(server.url) as client:
                return _measure(farm, client, jobs)
        finally:
            server.stop()


def _measure(farm: Farm, client: redis.Redis, jobs: int) -> Figures:
    submit(farm, jobs)
    status_s = status(farm)
    reads_per_s, share = watch(farm, client)
    cpu, start = redis_cpu_s(client), time.perf_counter()
    while client.info("server")["uptime_in_seconds"] < farm.settings.lease_s + 1:
        time.sleep(0.5)
    farm.ledger.reap()
    round_ms, cpu_ms = (time.perf_counter() - start) * 1e3, (redis_cpu_s(client) - cpu) * 1e3
    noticed = lose_one(farm.ledger, client)
    with timed() as cancel_s:
        farm.cancel(farm.group(GROUP))
    left = sum(client.llen(key) for key in client.keys("m.*"))
    time.sleep(farm.settings.reap_s)
    while farm.ledger.reap().holding:  # a reaper that was silent for long holds one lease
        time.sleep(1)
    after = sum(client.llen(key) for key in client.keys("m.*"))
    return Figures(jobs, status_s, reads_per_s, share, cancel_s[0], left, after, round_ms, cpu_ms, noticed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = asdict(measure(options.jobs))
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:24} {value:12,.3f}" if isinstance(value, float) else f"{name:24} {value:12,}")


if __name__ == "__main__":
    main()
