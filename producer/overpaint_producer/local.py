"""A whole farm on this machine: Redis, S3, one worker and Flower, started in order and stopped in reverse.

Everything lies under one folder (`./overpaint-data`): data, logs, and `farm.toml`, by which other commands
find the farm. A service that the settings name is used instead of starting one. What was started and ends by
itself is started again.
"""

import os
import secrets
import signal
import sys
import sysconfig
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Self
from urllib.error import URLError

from overpaint_producer import children, services
from overpaint_producer.children import Child, Kept
from overpaint_producer.client import Farm
from overpaint_producer.local_folder import CONFIG, LOCK, SHARED, lock, write_config
from overpaint_shared.errors import MissingExtraError, ServiceError
from overpaint_shared.ledger.records import WorkerRecord
from overpaint_shared.ledger.states import JobState
from overpaint_shared.settings import Settings

WORKER = "worker"
GRACE_S = 10
"""What the worker gets to finish its jobs when the farm stops, seconds; the rest stay queued."""
READY_S = 120.0
"""A worker imports torch and reads its registry on a cold disk; Flower is quicker."""
WATCH_S = 0.2
FLOWER_USER = "operator"
RUNTIME_BUCKETS_S = "1,2,5,10,20,40,80,160,320,640"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to start."""

    data: Path
    settings: Settings
    """As given by options, environment and files: services named there are not started."""
    registry: Path | None = None
    """Whose models the worker renders; None: as the settings say, else the worker's own miniatures."""
    device: str = "cpu"
    slots: int = 6


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that runs, and how people find it."""

    name: str
    where: str
    kept: Kept | None = None
    """None for a service that was there before."""

    @property
    def child(self) -> Child | None:
        """Its process now."""
        return self.kept.child if self.kept else None


@dataclass
class LocalFarm:
    """A farm that runs while the `with` block does. `say` gets one line for each step."""

    plan: Plan
    say: Say
    settings: Settings = field(init=False)
    """Of the farm that runs, once started."""
    parts: list[Part] = field(default_factory=list, init=False)
    given_up: ServiceError | None = field(default=None, init=False)
    """What to say of a part that ends again and again, if one does: the main thread was interrupted then."""
    flower_password: str = field(default_factory=lambda: secrets.token_urlsafe(12), init=False, repr=False)
    # A record of the worker before this one may still be there, so each has a name of its own.
    _worker_name: str = field(default_factory=lambda: f"local-{secrets.token_hex(3)}", init=False)
    _lock: int = field(default=-1, init=False)
    _stopping: threading.Event = field(default_factory=threading.Event, init=False)
    _over: threading.Event = field(default_factory=threading.Event, init=False)
    _mending: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __enter__(self) -> Self:
        _need_worker()
        self.data.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.data / LOCK)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def data(self) -> Path:
        """The folder of everything, absolute."""
        return self.plan.data.resolve()

    @property
    def config(self) -> Path:
        """The settings file of this farm."""
        return self.data / CONFIG

    def connect(self) -> Farm:
        """A client of this farm. Raises ServiceError."""
        return Farm.connect(self.settings)

    # Starting

    def _start(self) -> None:
        given = self.plan.settings.model_dump(include=set(SHARED))
        given |= self._redis() | self._s3()
        registry = self.plan.registry and self.plan.registry.resolve()
        write_config(self.config, given | {"registry": registry})
        self.settings = Settings.load(self.config)
        self._worker(registry)
        self._flower()
        # Until here, whoever waits for a part to answer notices that it has ended.
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _redis(self) -> dict[str, str]:
        if self.plan.settings.source("redis_url"):
            self._add(
                Part(
                    name="Redis",
                    where=f"{self.plan.settings.redis_url.shown} {self._yours('redis_url')}",
                )
            )
            return {}
        folder, log = self.data / "redis", self._log("redis")
        redis = services.start_redis(folder, log=log)
        kept = Kept(redis.child, lambda: services.start_redis(folder, redis.port, log=log).child)
        self._add(Part(name="Redis", where=f"{services.HOST}:{redis.port}, with a password", kept=kept))
        return {"redis_url": redis.url}

    def _s3(self) -> dict[str, str]:
        settings = self.plan.settings
        if settings.source("s3_endpoint_url") or settings.source("s3_access_key"):
            yours = self._yours("s3_endpoint_url" if settings.s3_endpoint_url else "s3_access_key")
            where = f"{settings.s3_endpoint_url or 'Amazon S3'}, bucket {settings.s3_bucket} {yours}"
            self._add(Part(name="S3", where=where))
            return {}
        folder, log = self.data / "s3", self._log("s3")
        s3 = services.start_s3(folder, settings.s3_bucket, log=log)
        kept = Kept(s3.child, lambda: services.start_s3(folder, s3.bucket, log=log, same_ports=True).child)
        self._add(Part(name="S3", where=f"{s3.endpoint_url}, bucket {s3.bucket}", kept=kept))
        return {
            "s3_endpoint_url": s3.endpoint_url,
            "s3_access_key": s3.access_key,
            "s3_secret_key": s3.secret_key,
        }

    def _yours(self, setting: str) -> str:
        """Who named a service that was there before: seldom, another farm of this folder."""
        return f"(yours: {self.plan.settings.source(setting)})"

    def _worker(self, registry: Path | None) -> None:
        name = self._worker_name
        argv = [_script("overpaint-worker"), "--device", self.plan.device]
        argv += ["--registry", str(registry)] if registry else []
        argv += ["--slots", str(self.plan.slots), "--grace", str(GRACE_S), "--config", str(self.config)]
        if self.plan.device == "cpu":
            # One core stays free: torch's threads crawl when they have to share theirs.
            argv += ["--threads", str(max(1, (os.cpu_count() or 2) - 1))]
        if self.plan.device != "all":
            argv += ["--name", name]

        def start() -> Child:
            # Asked, it gives its jobs back, where Redis is yours and goes on. Others lose nothing by SIGKILL.
            return children.start("worker", argv, log=self._log("worker"), last=signal.SIGTERM)

        child = start()
        named = registry or self.settings.registry
        models = f"models of {self.shown(named)}" if named else "the miniature models"
        where = f"{self.plan.device}, {self.plan.slots} slots, {models}"
        self._add(Part(name=WORKER, where=where, kept=Kept(child, start)))
        with Farm(self.settings) as farm:
            known = {record.id for record in farm.workers() if not record.name.startswith(name)}

            def answers() -> bool:
                new = [record for record in farm.workers() if record.id not in known and record.features]
                if any(not _models(record) for record in new):
                    raise ServiceError(
                        f"the worker can load none of the {models}.\n{child.said()}",
                        fix="correct models.toml: docs/models.md",
                    )
                return bool(new)

            children.wait_ready(child, answers, timeout_s=READY_S)
        for fault in child.faults():
            self.say(f"  worker: {fault}")

    def _flower(self) -> None:
        port = services.free_ports(1)[0]
        argv = [sys.executable, "-m", "celery", "--app=overpaint_producer.monitor", "flower"]
        argv += [
            f"--address={services.HOST}",
            f"--port={port}",
            "--read_only=True",
            "--purge_offline_workers=60",
        ]
        argv += [f"--task_runtime_metric_buckets={RUNTIME_BUCKETS_S}"]
        # In the environment, not among the arguments, which every user of the machine can read.
        secret = {
            "FLOWER_BASIC_AUTH": f"{FLOWER_USER}:{self.flower_password}",
            "OVERPAINT_CONFIG": str(self.config),
        }

        def start() -> Child:
            return children.start("Flower", argv, log=self._log("flower"), env=secret)

        child = start()
        url = f"http://{services.HOST}:{port}"
        where = f"{url}, user {FLOWER_USER}, password {self.flower_password}"
        self._add(Part(name="Flower", where=where, kept=Kept(child, start)))
        children.wait_ready(child, lambda: _answers(f"{url}/healthcheck"), timeout_s=READY_S)

    def _add(self, part: Part) -> None:
        self.parts.append(part)

    def _log(self, name: str) -> Path:
        return self.data / "logs" / f"{name}.log"

    def shown(self, path: Path) -> str:
        """A path as people at the working directory would write it."""
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

    # Running and stopping

    def _watch(self) -> None:
        """Start again what ends by itself. This thread lives as long as what it starts: see `guarded`."""
        while not self._over.wait(WATCH_S):
            with self._mending:
                for part in () if self._stopping.is_set() else list(self.parts):
                    self._look_after(part)

    def _look_after(self, part: Part) -> None:
        try:
            said = part.kept.step() if part.kept else None
        except ServiceError as error:
            self.given_up = error
            self._stopping.set()
            # A true signal: only that ends a wait on a lock, where the main thread spends its time.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            return
        if said:
            self.say(said)

    def stop(self) -> None:
        """Stop what was started, the last first, and let go of the folder. May be called twice."""
        self._stopping.set()
        self._mending.acquire()  # what is being started now is stopped as well
        self._mending.release()
        while self.parts:
            part = self.parts[-1]  # it stays there to be hurried or killed
            if part.child is not None:
                if part.child.alive:
                    self.say(f"stopping {part.name}{self._waiting_for() if part.name == WORKER else ''}")
                part.child.stop(timeout_s=GRACE_S + 10)
            self.parts.pop()
        self._over.set()
        if self._lock >= 0:
            self.config.unlink(missing_ok=True)  # nobody is there to be found
            os.close(self._lock)
            self._lock = -1

    def _waiting_for(self) -> str:
        """What keeps the worker when it is asked to stop, and how to hurry it; nothing if it is idle."""
        try:
            with self.connect() as farm:
                running = farm.jobs(state={JobState.RUNNING, JobState.CANCELLING})
        except ServiceError:  # Redis is gone
            return ""
        ours = "" if self.plan.device == "all" else self._worker_name  # many workers name themselves
        count = sum((record.worker_name or "").startswith(ours) for record in running)
        if not count:
            return ""
        jobs = "1 job" if count == 1 else f"{count} jobs"
        return (
            f": it gets {GRACE_S} s to finish {jobs}, and gives back to the queue what is not done then. "
            "Ctrl-C again: gives back at once"
        )

    def hurry(self) -> None:
        """Have the worker give back at once what it renders; if there is no worker, end everything."""
        for part in self.parts:
            if part.name == WORKER and part.child is not None and part.child.alive:
                part.child.process.terminate()  # a worker's second signal; docs/worker.md
                return
        self.kill()

    def kill(self) -> None:
        """End everything at once."""
        for part in self.parts:
            if part.child is not None:
                part.child.process.kill()

    def screen(self) -> str:
        """What runs where, for people."""
        width = max(len(part.name) for part in self.parts)
        lines = [f"  {part.name:<{width}}  {part.where}" for part in self.parts]
        lines += [f"  {'logs':<{width}}  {self.shown(self.data / 'logs')}"]
        lines += [f"  {'config':<{width}}  {self.shown(self.config)}"]
        return "\n".join(lines)


def _need_worker() -> None:
    missing = [name for name in ("torch", "diffusers", "transformers", "flower") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"`overpaint up` needs {', '.join(missing)}, which is not installed",
            fix="pip install 'overpaint[worker,local]'",
        )


def _models(record: WorkerRecord) -> list[object]:
    """The models that a worker could read, which may be fewer than those it was told to serve."""
    return [entry["name"] for entry in record.catalogue if entry.get("kind") == "model"]


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - a URL of our own
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
