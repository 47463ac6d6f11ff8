"""What each of the ledger's scripts costs Redis.

    python bench/scripts.py [--rounds 50] [--url redis://...] [--json]

Starts a Redis of its own, or uses an empty one (`--url`). Microseconds of Redis per call, by its own count
(`INFO commandstats`): the least of all rounds, which hardly depends on what else the machine does.
"""

import argparse
import json
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from submit import submissions

from overpaint_producer.services import start_redis
from overpaint_shared.ledger import (
    Beat,
    Cancelled,
    Done,
    Failed,
    Ledger,
    ReleaseReason,
    WorkerRecord,
)
from overpaint_shared.setting_views import LedgerSettings

JOBS = 24  # few: the least of many small batches is steady on a busy machine
WAITING = 1000  # of another owner, so that indexes are no toys
WORKER = uuid.uuid4().hex
Times = dict[str, list[float]]


class Meter:
    """Reads what Redis took."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.times: Times = defaultdict(list)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Of the scripts that are run in this block, per call."""
        self._client.config_resetstat()
        yield
        stats: dict[str, Any] = self._client.info("commandstats")
        row = stats["cmdstat_evalsha"]
        self.times[name].append(row["usec"] / row["calls"])


def each_script(ledger: Ledger, meter: Meter) -> Callable[[], None]:
    """A round of the reaper, each of its scripts measured by itself."""
    scripts = ledger._scripts  # noqa: SLF001
    run = scripts.run

    def measured(name: str, *args: object) -> Any:
        with meter.of(name):
            return run(name, *args)

    def round_() -> None:
        scripts.run = measured  # type: ignore[method-assign]
        try:
            while ledger.reap().holding:  # it was silent for long
                time.sleep(0.02)
        finally:
            scripts.run = run  # type: ignore[method-assign]

    return round_


def one_round(ledger: Ledger, patient: Ledger, meter: Meter, number: int) -> None:
    jobs = submissions(JOBS)
    ids = [job.id for job in jobs]
    with meter.of("submit, one call each"):
        for job in jobs:
            ledger.submit([job])
    batch = submissions(JOBS)
    with meter.of("submit, batched"):
        ledger.submit(batch)
    with meter.of("submit, again"):
        ledger.submit(batch)
    with meter.of("cancel"):
        for job in batch:
            ledger.cancel(job.id)
    each_script(patient, meter)()
    with meter.of("claim"):
        tokens = {job_id: ledger.claim(job_id, WORKER).token for job_id in ids}
    renew(ledger, meter, ids, tokens, number)
    end(ledger, meter, ids, tokens)


def renew(ledger: Ledger, meter: Meter, ids: Sequence[str], tokens: dict[str, int], number: int) -> None:
    for many in (1, 6):
        with meter.of(f"renew of {many}"):
            for step in range(20):
                beats = [Beat(one, tokens[one], "denoise", step + 1, 100 + number) for one in ids[:many]]
                ledger.renew(WORKER, beats)


def end(ledger: Ledger, meter: Meter, ids: Sequence[str], tokens: dict[str, int]) -> None:
    third = JOBS // 3
    with meter.of("finish"):
        for one in ids[:third]:
            ledger.finish(one, tokens[one], Done({"picture": "results/x"}))
    with meter.of("release"):
        for one in ids[third : 2 * third]:
            ledger.release(one, tokens[one], ReleaseReason.STOPPED, "the worker stops")
    with meter.of("finish as failed"):
        for one in ids[2 * third :]:
            ledger.finish(one, tokens[one], Failed({"code": "x", "message": "y", "fix": "z"}))
    with meter.of("replay"):
        for one in ids[2 * third :]:
            ledger.replay(one)
    for one in ids[third:]:
        ledger.cancel(one)
        ledger.finish(one, ledger.claim(one, WORKER).token, Cancelled())


def measure(url: str, rounds: int) -> Times:
    client = redis.Redis.from_url(url, decode_responses=True)
    if client.dbsize():
        sys.exit(f"{url} is not empty")
    meter = Meter(client)
    ledger = Ledger.connect(url, LedgerSettings())
    reaper = LedgerSettings(lease_s=0.01, reap_s=0.05, reap_grace_s=600)
    patient = Ledger.connect(url, reaper)
    waiting = submissions(WAITING)
    ledger.submit([type(job)(**fields(job), owner="crowd") for job in waiting])
    worker = WorkerRecord(
        id=WORKER, name="w", host="host", device="cpu", slots=4, version="1", models=("sd15",)
    )
    for number in range(rounds):
        with meter.of("announce"):
            ledger.announce(worker)
        one_round(ledger, patient, meter, number)
    client.flushall()
    return meter.times


def fields(job: Any) -> dict[str, Any]:
    names = ("id", "spec_json", "model", "priority", "labels", "title", "features")
    return {name: getattr(job, name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--url", help="an empty Redis that is there")
    parser.add_argument("--json", action="store_true", help="only the JSON")
    options = parser.parse_args()
    if options.url:
        times = measure(options.url, options.rounds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            server = start_redis(Path(folder))
            try:
                times = measure(server.url, options.rounds)
            finally:
                server.stop()
    figures = {name: round(min(values), 1) for name, values in times.items()}
    print(json.dumps(figures))
    if not options.json:
        for name, figure in figures.items():
            print(f"{name:24} {figure:8.1f} µs", file=sys.stderr)


if __name__ == "__main__":
    main()
