"""Real worker processes on real services, for integration tests: most with the fake engine, some with the
real one.
"""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from overpaint_producer.children import guarded
from overpaint_shared.ledger import TERMINAL, JobRecord, JobState, Ledger, Submission
from overpaint_shared.queues import make_app, publish
from overpaint_shared.settings import Settings
from overpaint_shared.store import Store
from tests import fake_engine
from tests.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_WORKER = Path(__file__).with_name("run_worker.py")
OWNER = "tester"


@dataclass
class WorkerProcess:
    """One worker in a process group of its own."""

    popen: subprocess.Popen[bytes]
    log: Path
    journal: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its log so far."""
        found = []
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def said(self, action: str, **more: object) -> list[dict[str, Any]]:
        """The log lines of an action."""
        wanted = {"action": action} | more
        return [line for line in self.lines if wanted.items() <= line.items()]

    def until(self, action: str, times: int = 1, within_s: float = 60.0, **more: object) -> dict[str, Any]:
        """Wait for the `times`-th line of an action."""
        try:
            wait_until(
                lambda: len(self.said(action, **more)) >= times or self.popen.poll() is not None, within_s
            )
            return self.said(action, **more)[times - 1]
        except (AssertionError, IndexError):
            raise AssertionError(
                f"no {action} (exit {self.popen.poll()}):\n{self.log.read_text()[-6000:]}"
            ) from None

    def ready(self) -> "WorkerProcess":
        """Wait until it takes jobs."""
        self.until("engine.ready")
        return self

    @property
    def engine_pid(self) -> int:
        """The process id of its newest engine."""
        return int(self.said("engine.ready")[-1]["engine_pid"])

    @property
    def events(self) -> list[dict[str, Any]]:
        """What its fake engines did."""
        return [json.loads(x) for x in self.journal.read_text().splitlines()] if self.journal.exists() else []

    def kill_group(self) -> None:
        """As a machine that loses its power."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def terminate(self) -> None:
        """SIGTERM to the whole group, as service managers do."""
        os.killpg(self.popen.pid, signal.SIGTERM)

    def wait(self, within_s: float = 30.0) -> int:
        """Its exit code."""
        return self.popen.wait(within_s)


@dataclass
class TestFarm:
    """Services, a producer's view of them, and the workers that a test starts."""

    __test__ = False

    settings: Settings
    """The test's own side: a producer's."""
    folder: Path
    worker_settings: Settings | None = None
    """What workers are given; without, the same."""
    workers: list[WorkerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger.connect(self.settings.redis_url, self.settings.ledger())
        self.store = Store(self.settings.store())
        self.app: Celery = make_app(self.settings.redis_url)
        self.picture = self.store.put_input(OWNER, b"not looked at by the fake engine")

    def environment(self) -> dict[str, str]:
        """The settings, as a process gets them."""
        settings = self.worker_settings or self.settings
        store = settings.store()
        given = {
            "redis_url": str(settings.redis_url),
            "s3_endpoint_url": store.endpoint_url,
            "s3_bucket": store.bucket,
            "s3_access_key": store.access_key,
            "s3_secret_key": store.secret_key.get_secret_value() if store.secret_key else None,
            "s3_read_buckets": ",".join(store.read_buckets),
        }
        for name in (
            "lease_s",
            "renew_s",
            "reap_s",
            "reap_grace_s",
            "worker_ttl_s",
            "unable_after_s",
            "window",
        ):
            given[name] = str(getattr(settings, name))
        return {f"OVERPAINT_{name.upper()}": value for name, value in given.items() if value}

    def given(self, models: Sequence[str], registry: Path | None, **options: Any) -> dict[str, Any]:
        """What `run_worker.py` is asked for."""
        here = {"device": "cpu", "models": list(models), "registry": str(registry or "none")}
        return here | {"spare": False} | options  # the few tests of the spare ask for it

    def surroundings(self) -> dict[str, str]:
        """The environment beside the settings."""
        return dict(os.environ)

    def start(
        self,
        models: Sequence[str] = ("tiny",),
        registry: Path | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> WorkerProcess:
        """Start a worker; with a registry it has the real engine."""
        number = len(self.workers)
        log, journal = self.folder / f"worker-{number}.log", self.folder / f"engine-{number}.jsonl"
        given = self.given(models, registry, **options)
        if registry is None:
            given["engine"] = [sys.executable, fake_engine.__file__]
            told = [fake_engine.JOURNAL, *(environment or {})]
            given["engine_env"] = [name for name in told if name.startswith("FAKE_ENGINE")]
        with log.open("wb") as out:
            popen = subprocess.Popen(
                guarded([sys.executable, str(RUN_WORKER), json.dumps(given)]),
                cwd=REPOSITORY,
                env=self.surroundings()
                | self.environment()
                | {fake_engine.JOURNAL: str(journal), "OMP_NUM_THREADS": "1"}
                | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.workers.append(WorkerProcess(popen, log, journal))
        return self.workers[-1]

    def spec(self, model: str = "tiny", steps: int = 3, **script: Any) -> dict[str, Any]:
        """A job for the fake engine; `script` is what it does."""
        return {
            "version": 1,
            "model": model,
            "source": {"image": f"sha256:{self.picture}"},
            "method": {"kind": "img2img"},
            "prompt": json.dumps(script) if script else "",
            "sampling": {"seed": 0, "steps": steps},
        }

    def long(self, **script: Any) -> dict[str, Any]:
        """A job that does not end by itself within a test."""
        return self.spec(steps=1000, **({"step_s": 0.2} | script))

    def submit(self, *specs: dict[str, Any], priority: int = 5, deadline_s: float | None = None) -> list[str]:
        """Submit jobs as a producer does; their ids."""
        items = [
            Submission(
                id=uuid.uuid4().hex,
                owner=OWNER,
                spec_json=json.dumps(spec),
                model=spec["model"],
                priority=priority,
                deadline_s=deadline_s,
                title=f"{spec['model']} {spec['method']['kind']} 64x64",
            )
            for spec in specs
        ]
        answers = self.ledger.submit(items)
        publish(self.app, [wakeup for answer in answers for wakeup in answer.wakeups])
        return [item.id for item in items]

    def job(self, job_id: str) -> JobRecord:
        """A job's record."""
        record = self.ledger.job(job_id)
        assert record is not None
        return record

    def until(self, job_id: str, *states: JobState, within_s: float = 60.0) -> JobRecord:
        """Wait until a job is in one of these states."""
        try:
            wait_until(lambda: self.job(job_id).state in states, within_s)
        except AssertionError:
            logs = "\n".join(w.log.read_text()[-4000:] for w in self.workers)
            raise AssertionError(f"not {states} within {within_s} s: {self.job(job_id)}\n{logs}") from None
        return self.job(job_id)

    def stepping(self, job_id: str, within_s: float = 60.0) -> JobRecord:
        """Wait until a job makes steps."""
        wait_until(
            lambda: self.job(job_id).state is JobState.RUNNING and self.job(job_id).step > 0,
            within_s,
            f"{job_id} makes steps",
        )
        return self.job(job_id)

    def all_ended(self, ids: Sequence[str], within_s: float = 120.0) -> Counter[JobState]:
        """Wait until all have ended; how."""
        left = set(ids)

        def ended() -> bool:
            left.difference_update([i for i in left if self.job(i).state in TERMINAL])
            return not left

        try:
            wait_until(ended, within_s)
        except AssertionError:
            states = Counter(self.job(i).state for i in ids)
            logs = "\n".join(w.log.read_text()[-4000:] for w in self.workers)
            raise AssertionError(f"{states} after {within_s} s\n{logs}") from None
        return Counter(self.job(i).state for i in ids)

    def commits(self) -> Counter[str]:
        """How often each job was committed as done, by the workers' own word."""
        return Counter(line["job"] for worker in self.workers for line in worker.said("job.done"))

    def end(self) -> None:
        """No process is left."""
        for worker in self.workers:
            worker.kill_group()
        self.app.close()
        self.ledger.close()


@pytest.fixture
def farm(farm_settings: Settings, tmp_path: Path) -> Iterator[TestFarm]:
    """A farm on empty services that notices loss within seconds."""
    quick = {"lease_s": 3.0, "renew_s": 0.5, "reap_s": 0.3, "reap_grace_s": 1.0, "worker_ttl_s": 3.0}
    made = TestFarm(farm_settings.model_copy(update=quick | {"unable_after_s": 1.0}), tmp_path)
    yield made
    made.end()
