"""How fast jobs are submitted, and what a waiting job costs in Redis.

    python bench/submit.py [--jobs 5000] [--json]

Starts a Redis of its own (append-only file, synced every second). Measured, each with a record, and with a
message where one is due:

    singly      one `Ledger.submit` and one `publish` per job
    batched     1000 jobs per `Ledger.submit` and `publish`
    every job   the same, with a window that gives each job a message: the dearest case
    baseline    plain Celery, `apply_async` one by one with the spec in the message: no record, no fair share

Wall-clock jobs per second, CPU microseconds per job of the client and of Redis, and Redis' memory per waiting
job. On a machine that does other things too, the CPU times say more than the rate.
"""

import argparse
import json
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import redis
from celery import Celery
from kombu import Queue

from overpaint_producer.services import start_redis
from overpaint_shared.job import parse_job
from overpaint_shared.ledger import Ledger, Submission
from overpaint_shared.queues import make_app, publish
from overpaint_shared.setting_views import LedgerSettings

CHUNK = 1000
TARGETS = {"singly": 1000, "batched": 4000}
TARGET_BYTES = 3500
JOB = {
    "version": 1,
    "model": "sd15",
    "source": {"image": "sha256:" + "5e" * 32},
    "mask": {
        "from": "image",
        "image": "sha256:" + "a1" * 32,
        "ops": [{"op": "grow", "by": 6, "tapered": True}],
    },
    "method": {"kind": "latent_noise_mask"},
    "prompt": "a watercolour of a red hat on a wooden table, soft light from the left, fine paper grain",
    "negative_prompt": "blurry, low quality, text, watermark",
    "sampling": {"seed": 1234567890, "steps": 20, "cfg": 7.0, "sampler": "dpmpp_2m", "scheduler": "karras"},
    "labels": {"shot": "12"},
}


@dataclass(frozen=True)
class Figure:
    """One way of submitting."""

    jobs_per_s: float
    client_cpu_us_per_job: float
    redis_cpu_us_per_job: float
    redis_bytes_per_job: float
    messages: int


def submissions(count: int) -> list[Submission]:
    spec = parse_job(JOB)
    text, features = spec.to_json(), spec.features()
    return [
        Submission(
            id=uuid.uuid4().hex,
            owner="default",
            spec_json=text,
            model=spec.model,
            priority=spec.priority,
            labels=spec.labels,
            title="sd15 latent_noise_mask 512x512",
            features=features,
        )
        for _ in range(count)
    ]


def measured(client: redis.Redis, jobs: int, work: Callable[[], None]) -> Figure:
    """Time and memory of `work`, which leaves `jobs` waiting in an empty Redis."""
    client.flushall()
    before = client.info("memory")["used_memory"]
    redis_cpu, cpu, wall = redis_cpu_s(client), time.process_time(), time.perf_counter()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    redis_cpu = redis_cpu_s(client) - redis_cpu
    used = client.info("memory")["used_memory"] - before
    messages = sum(client.llen(key) for key in client.keys("m.*"))
    return Figure(jobs / wall, cpu / jobs * 1e6, redis_cpu / jobs * 1e6, used / jobs, messages)


def redis_cpu_s(client: redis.Redis) -> float:
    cpu = client.info("cpu")
    return float(cpu["used_cpu_user_main_thread"] + cpu["used_cpu_sys_main_thread"])


def submit(ledger: Ledger, app: Celery, jobs: Sequence[Submission], chunk: int) -> None:
    for start in range(0, len(jobs), chunk):
        for answer in ledger.submit(jobs[start : start + chunk]):
            publish(app, answer.wakeups)


def submit_batched(ledger: Ledger, app: Celery, jobs: Sequence[Submission]) -> None:
    for start in range(0, len(jobs), CHUNK):
        answers = ledger.submit(jobs[start : start + CHUNK])
        publish(app, [wakeup for answer in answers for wakeup in answer.wakeups])


def baseline(url: str, jobs: Sequence[Submission]) -> None:
    app = Celery("baseline", broker=url, set_as_current=False)
    app.conf.update(task_ignore_result=True, task_queues=[Queue("m.sd15")], task_default_queue="m.sd15")

    @app.task(name="render")
    def render(spec: str) -> str:
        return spec

    for job in jobs:
        render.apply_async((job.spec_json,), task_id=job.id)
    app.close()


def run(url: str, count: int) -> dict[str, Figure]:
    client = redis.Redis.from_url(url)
    app = make_app(url)
    ledger = Ledger.connect(url, LedgerSettings())
    unlimited = Ledger.connect(url, LedgerSettings(window=count))
    jobs = submissions(count)
    submit(ledger, app, jobs[:10], 1)  # connections and scripts are there before the clock starts
    submit(unlimited, app, jobs[:10], 1)
    figures = {
        "singly": measured(client, count, lambda: submit(ledger, app, jobs, 1)),
        "batched": measured(client, count, lambda: submit_batched(ledger, app, jobs)),
        "every job": measured(client, count, lambda: submit_batched(unlimited, app, jobs)),
        "baseline": measured(client, count, lambda: baseline(url, jobs)),
    }
    app.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--json", action="store_true", help="only the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = start_redis(Path(folder))
        try:
            figures = run(server.url, options.jobs)
        finally:
            server.stop()
    plain = {name: asdict(figure) for name, figure in figures.items()}
    print(
        json.dumps({"jobs": options.jobs, "targets": TARGETS, "target_bytes": TARGET_BYTES, "figures": plain})
    )
    if not options.json:
        report(figures)


def report(figures: dict[str, Figure]) -> None:
    out = sys.stderr  # the JSON alone goes to a pipe
    print(
        f"{'':10} {'jobs/s':>8} {'target':>7} {'client us':>10} {'redis us':>9} {'bytes/job':>10}"
        f" {'messages':>9}",
        file=out,
    )
    for name, one in figures.items():
        print(
            f"{name:10} {one.jobs_per_s:8.0f} {TARGETS.get(name, '-'):>7} {one.client_cpu_us_per_job:10.0f}"
            f" {one.redis_cpu_us_per_job:9.0f}"
            f" {one.redis_bytes_per_job:10.0f} {one.messages:9}",
            file=out,
        )
    print(f"target: at most {TARGET_BYTES} bytes per waiting job", file=out)


if __name__ == "__main__":
    main()
