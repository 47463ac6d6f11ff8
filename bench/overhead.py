"""What the farm itself costs per job: submit to result in S3, less the time that the engine has the job.

    OMP_NUM_THREADS=1 python bench/overhead.py [--jobs 30] [--together 60] [--engine real|fake] [--json]

On embedded Redis and S3, with one worker and tiny weights, 64 x 64 pixels. Two shapes of load: one job at a
time (a job is submitted when the one before is in S3), and many at once. Each stage is itemised:

    submit    the producer's call: upload the picture if new, record the job, send its message
    wake      the message's way: end of `submit` to the worker's claim (below 0 where the claim was quicker)
    fetch     the worker reads the spec and gets the picture from S3
    engine    from handing the job to the engine to its answer; not counted as the farm's
    store     the files' way to S3
    commit    the result is told to the ledger

The baseline, in the same run: a stock Celery worker (a pool of as many threads) on the same Redis and S3,
whose task gets the same picture and puts the same files, without a ledger, a lease or an engine.

For many at once, waiting is no cost of the farm, so it reports two things: the stages' own times under that
load, and seconds per job of the whole less the time in which the engine had at least one job.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from overpaint_producer.client import Farm
from overpaint_producer.services import start_redis, start_s3
from overpaint_shared.ledger import TERMINAL, JobRecord, JobState
from overpaint_shared.settings import Settings
from overpaint_shared.store import Store

ROOT = Path(__file__).resolve().parent.parent
TARGET_MS = 20.0
STAGES = ("submit", "wake", "fetch", "store", "commit")
SLOTS = 8
BARE_KEY = "bench:bare:"


def picture() -> bytes:
    """A 64 x 64 PNG."""
    from PIL import Image

    out = BytesIO()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(out, "PNG")
    return out.getvalue()


def spec(sha256: str, seed: int) -> dict[str, Any]:
    return {
        "version": 1,
        "model": "tiny",
        "source": {"image": f"sha256:{sha256}"},
        "method": {"kind": "img2img"},
        "prompt": "",
        "sampling": {
            "seed": seed,
            "steps": 1,
            "cfg": 1.0,
            "sampler": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        },
    }


@contextmanager
def services(folder: Path) -> Iterator[Settings]:
    """Redis and S3 of this run's own."""
    kv = start_redis(folder / "redis")
    s3 = start_s3(folder / "s3")
    try:
        yield Settings.load(
            redis_url=kv.url,
            s3_endpoint_url=s3.endpoint_url,
            s3_bucket=s3.bucket,
            s3_access_key=s3.access_key,
            s3_secret_key=s3.secret_key,
        )
    finally:
        kv.stop()
        s3.kill()


def environment(settings: Settings) -> dict[str, str]:
    store = settings.store()
    assert store.secret_key
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OVERPAINT_REDIS_URL": str(settings.redis_url),
        "OVERPAINT_S3_ENDPOINT_URL": str(store.endpoint_url),
        "OVERPAINT_S3_BUCKET": store.bucket,
        "OVERPAINT_S3_ACCESS_KEY": str(store.access_key),
        "OVERPAINT_S3_SECRET_KEY": store.secret_key.get_secret_value(),
    }


@contextmanager
def process(
    command: Sequence[str], settings: Settings, log: Path, ready: Callable[[], bool]
) -> Iterator[None]:
    """A child that is up; terminated at the end."""
    with log.open("wb") as out:
        child = subprocess.Popen(command, cwd=ROOT, env=environment(settings), stdout=out, stderr=out)
    try:
        while not ready():
            assert child.poll() is None, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        child.terminate()
        child.wait(30)


def worker_command(engine: str) -> list[str]:
    options: dict[str, Any] = {
        "device": "cpu",
        "models": ["tiny"],
        "slots": SLOTS,
        "registry": "none",
        "grace_s": 0,
    }
    if engine == "real":
        from tests.weights import build_tiny_registry

        options["registry"] = str(build_tiny_registry())
    else:
        options["engine"] = [sys.executable, str(ROOT / "tests" / "fake_engine.py")]
    return [sys.executable, str(ROOT / "tests" / "run_worker.py"), json.dumps(options)]


def stages(record: JobRecord, began: float, submitted: float) -> dict[str, float]:
    """Seconds of each stage of one job. Redis and this program share a clock."""
    assert record.state is JobState.DONE, record
    assert record.result
    assert record.started
    assert record.ended
    spent: dict[str, float] = record.result["summary"]["worker"]["seconds"]
    inside = spent["fetch_s"] + spent["engine_s"] + spent["store_s"]
    return {
        "submit": submitted - began,
        "wake": record.started - submitted,
        "fetch": spent["fetch_s"],
        "engine": spent["engine_s"],
        "store": spent["store_s"],
        "commit": record.ended - record.started - inside,
        "own": record.ended - began - spent["engine_s"],
        "engine_from": record.started + spent["fetch_s"],
    }


def wait(farm: Farm, ids: Sequence[str]) -> list[JobRecord]:
    """Their records, once all have ended. Asks sparingly: it shares the machine with what it measures."""
    for job_id in ids:
        while (record := farm.ledger.job(job_id)) is None or record.state not in TERMINAL:
            time.sleep(0.005)
    return [record for job_id in ids if (record := farm.ledger.job(job_id))]


def singly(farm: Farm, sha256: str, jobs: int) -> list[dict[str, float]]:
    out = []
    for seed in range(jobs + 3):
        began = time.time()
        job = farm.submit(spec(sha256, seed))
        submitted = time.time()
        out.append(stages(wait(farm, [job.id])[0], began, submitted))
    return out[3:]  # the first ones fill caches and open connections


def together(farm: Farm, sha256: str, jobs: int) -> tuple[list[dict[str, float]], float]:
    """Each job's stages, and seconds per job less the time in which the engine had any."""
    began = time.time()
    submitted_jobs = farm.submit_many([spec(sha256, seed) for seed in range(jobs)])
    submitted = time.time()
    records = wait(farm, [job.id for job in submitted_jobs])
    found = [stages(record, began, submitted) for record in records]
    whole = max(record.ended or 0 for record in records) - began
    busy = covered([(one["engine_from"], one["engine_from"] + one["engine"]) for one in found])
    return found, (whole - busy) / jobs


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


# ------------------------------------------------------------------------------------------------ the
# baseline


def bare_app(settings: Settings) -> Celery:
    """Celery as its own documentation sets it up."""
    app = Celery("bare", broker=str(settings.redis_url), set_as_current=False)
    app.conf.update(
        task_ignore_result=True, broker_connection_retry_on_startup=True, worker_hijack_root_logger=False
    )
    store, client = Store(settings.store()), redis.Redis.from_url(settings.redis_url)

    @app.task(name="bare.work", shared=False)
    def work(job: str, sha256: str, files: dict[str, int]) -> None:
        store.get_input("default", sha256, 1_000_000)
        for name, size in files.items():
            store.put_result(job, 1, name, bytes(size), "image/png")
        client.set(BARE_KEY + job, time.time())

    return app


def bare(settings: Settings, sha256: str, files: dict[str, int], jobs: int, *, at_once: bool) -> list[float]:
    """Seconds from the call to the end of each task; of many at once, seconds per job of the whole."""
    app, client = bare_app(settings), redis.Redis.from_url(settings.redis_url, decode_responses=True)

    def ended(job: str) -> float:
        while (at := client.get(BARE_KEY + job)) is None:
            time.sleep(0.001)
        return float(at)

    names = [f"{'many' if at_once else 'one'}-{n}" for n in range(jobs)]
    began = []
    for name in names:
        began.append(time.time())
        app.send_task("bare.work", args=(name, sha256, files))
        if not at_once:
            ended(name)
    ends = [ended(name) for name in names]
    app.close()
    if at_once:
        return [(max(ends) - began[0]) / jobs]
    return [end - begin for begin, end in zip(began, ends, strict=True)][3:]


def run_bare_worker() -> None:
    app = bare_app(Settings.load())
    app.worker_main(["worker", "--pool=threads", f"--concurrency={SLOTS}", "--loglevel=INFO"])


# ------------------------------------------------------------------------------------------------ the report


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile, in milliseconds."""
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return {"median_ms": statistics.median(ordered) * 1e3, "p90_ms": p90 * 1e3}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, services(Path(name)) as settings, Farm(settings) as farm:
        folder = Path(name)
        farm.store.ensure_bucket()
        sha256 = farm.store.put_input(settings.owner, picture())
        command = worker_command(options.engine)
        with process(command, settings, folder / "worker.log", lambda: bool(farm.ledger.workers())):
            one = singly(farm, sha256, options.jobs)
            many, per_job = together(farm, sha256, options.together)
            files = _sizes(farm)
        bare_command = [sys.executable, str(Path(__file__).resolve()), "--bare-worker"]
        log = folder / "bare.log"
        with process(bare_command, settings, log, lambda: "ready" in log.read_text()):
            bare_one = bare(settings, sha256, files, options.jobs, at_once=False)
            (bare_many,) = bare(settings, sha256, files, options.together, at_once=True)
    own = quantiles([job["own"] for job in one])
    baseline = quantiles(bare_one)
    return {
        "engine": options.engine,
        "one_at_a_time": {
            "jobs": len(one),
            "own": own,
            "stages": {stage: quantiles([job[stage] for job in one]) for stage in (*STAGES, "engine")},
            "bare_celery": baseline,
            "ratio_to_bare_celery": own["median_ms"] / baseline["median_ms"],
        },
        "at_once": {
            "jobs": len(many),
            "own_per_job_ms": per_job * 1e3,
            "stages": {
                s: quantiles([job[s] for job in many]) for s in ("fetch", "store", "commit", "engine")
            },
            "bare_celery_per_job_ms": bare_many * 1e3,
            "ratio_to_bare_celery": per_job / bare_many,
        },
        "target_ms": TARGET_MS,
    }


def _sizes(farm: Farm) -> dict[str, int]:
    """Names and sizes of a job's files."""
    (record, *_) = farm.ledger.jobs(state=JobState.DONE, limit=1)
    keys: dict[str, str] = (record.result or {})["files"]
    return {name: len(farm.store.get(key, 10_000_000)) for name, key in keys.items()}


def show(found: dict[str, Any]) -> None:
    one, many = found["one_at_a_time"], found["at_once"]
    print(f"one at a time, {one['jobs']} jobs, {found['engine']} engine         median      p90")
    for stage, value in one["stages"].items():
        note = "  (not the farm's)" if stage == "engine" else ""
        print(f"  {stage:34} {value['median_ms']:8.1f} {value['p90_ms']:8.1f} ms{note}")
    print(f"  {'the farm itself':34} {one['own']['median_ms']:8.1f} {one['own']['p90_ms']:8.1f} ms")
    bare_ms = one["bare_celery"]
    print(f"  {'bare Celery, same Redis and S3':34} {bare_ms['median_ms']:8.1f} {bare_ms['p90_ms']:8.1f} ms")
    print(f"  {'ratio':34} {one['ratio_to_bare_celery']:8.2f}")
    print(f"{many['jobs']} at once")
    for stage, value in many["stages"].items():
        print(f"  {stage:34} {value['median_ms']:8.1f} {value['p90_ms']:8.1f} ms")
    print(f"  {'the farm itself, per job':34} {many['own_per_job_ms']:8.1f} ms")
    print(f"  {'bare Celery, per job':34} {many['bare_celery_per_job_ms']:8.1f} ms")
    print(f"  {'ratio':34} {many['ratio_to_bare_celery']:8.2f}")
    print(f"target, one at a time: at most {found['target_ms']:g} ms median")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--together", type=int, default=60)
    parser.add_argument("--engine", choices=("real", "fake"), default="real")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--bare-worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare_worker:
        run_bare_worker()
        return
    sys.path.insert(0, str(ROOT))
    found = measure(options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
