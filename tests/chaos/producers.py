"""Who submits the plan's jobs, cancels and replays: real producers, which try again with their token."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any, Final

import redis
from PIL import Image

from overpaint_producer import garbage
from overpaint_producer.children import guarded
from overpaint_producer.client import Farm
from overpaint_shared import store
from overpaint_shared.errors import InputError, OverpaintError, ServiceError
from overpaint_shared.ledger import TERMINAL
from tests.chaos.farm import Hurt
from tests.chaos.plan import OWNERS, PICTURES, Plan, PlannedJob
from tests.fake_engine import marked
from tests.workers import REPOSITORY

AGAIN_S: Final = 0.3
OLD: Final = timedelta(seconds=10)
"""What `overpaint gc` spares, in place of a day; all ages that go with it are scaled alike."""
DOES: Final = {"kill": ("kill", 2), "kill_first": ("kill", 0), "hang": ("stop", 2), "decode": ("decode", 0)}


def picture(number: int) -> bytes:
    """One of the pictures that jobs name; the same at each call."""
    dice, out = Random(number), io.BytesIO()
    Image.frombytes("RGB", (64, 64), dice.randbytes(64 * 64 * 3)).save(out, "PNG")
    return out.getvalue()


class Producers:
    """One for each owner, and one for each job that needs more than a plain submit."""

    def __init__(self, hurt: Hurt, plan: Plan) -> None:
        self.hurt = hurt
        self.plan = plan
        self.accepted: dict[int, str] = {}
        self.accepted_at: dict[int, float] = {}
        self.cancelled: set[int] = set()
        self.replayed: Counter[int] = Counter()
        self.collected = 0
        self.refusals: Counter[str] = Counter()
        self.untyped: list[str] = []
        self.over = threading.Event()
        self.folder = hurt.folder / "pictures"
        self.pool = ThreadPoolExecutor(32, thread_name_prefix="producer")
        self._farms = {owner: Farm(hurt.settings(owner)) for owner in OWNERS}

    def prepare(self) -> None:
        """Make the pictures, and store those that jobs will name by their digest."""
        store.REFRESH_AFTER, store.KNOWN_FOR = OLD / 2, OLD / 10
        self.folder.mkdir()
        for number in range(PICTURES):
            (self.folder / f"{number}.png").write_bytes(picture(number))
        for job in self.plan.jobs:
            if job.via == "named":
                self._farms[job.owner].store.put_input(job.owner, self.source(job))

    def start(self, began: float) -> None:
        """Submit every job that no fault submits, at its time; `began`: the plan's zero, monotonic."""
        for owner in OWNERS:
            mine = [job for job in self.plan.jobs if job.owner == owner and job.via == "producer"]
            self.pool.submit(self._in_order, [job for job in mine if job.after is None], began)
        for job in self.plan.jobs:
            if job.after is not None:
                self.pool.submit(self._follow, job, began)

    def close(self) -> None:
        """Give up what is not accepted yet."""
        self.over.set()
        self.pool.shutdown(wait=True, cancel_futures=True)
        for farm in self._farms.values():
            farm.close()

    # What a job is

    def source(self, job: PlannedJob) -> bytes:
        """Its picture."""
        return picture(1000 + job.number if job.via == "named" else job.picture)

    def prompt(self, job: PlannedJob) -> str:
        """What the fake engine does with it."""
        if job.real:
            return "a lake"
        script: dict[str, Any] = {"mark": job.number, "step_s": job.step_s}
        if job.does in DOES:
            script["do"], script["at"] = DOES[job.does]
        elif job.does == "fail":
            script |= {"do": "fail", "at": 1}
        return json.dumps(script)

    def spec(self, job: PlannedJob) -> dict[str, Any]:
        """As a producer writes it."""
        named = f"sha256:{hashlib.sha256(self.source(job)).hexdigest()}"
        sampling = {"seed": job.steps if job.real else job.number, "steps": job.steps}
        return {
            "version": 1,
            "model": job.model,
            "source": {"image": named if job.via == "named" else str(self.folder / f"{job.picture}.png")},
            "method": {"kind": "img2img"},
            "prompt": self.prompt(job),
            "priority": job.priority,
            "sampling": sampling | {"sampler": "euler", "scheduler": "normal", "cfg": 4.0},
        } | ({"output": {"key": job.key}} if job.key else {})

    def expected(self, job: PlannedJob) -> bytes:
        """The picture that only this job has."""
        return marked(job.model, job.number, self.prompt(job), [self.source(job)])

    # Submitting

    def _in_order(self, jobs: list[PlannedJob], began: float) -> None:
        for job in jobs:
            self.over.wait(max(0.0, began + job.at - time.monotonic()))
            self.submit(job)

    def submit(self, job: PlannedJob) -> None:
        """Until it is accepted."""
        made = self._patiently(lambda: self._submitted(job), (OverpaintError,))
        if made is not None:
            self.accepted[job.number], self.accepted_at[job.number] = made.id, time.time()

    def _submitted(self, job: PlannedJob) -> Any:
        farm = self._farms[job.owner]
        try:
            return farm.submit(self.spec(job), token=job.token)
        except InputError:
            if job.via == "named":  # its picture is collected already, as the producer is told
                farm.store.put_input(job.owner, self.source(job))
            raise

    def cut(self, job: PlannedJob) -> str:
        """A producer that is killed on its way, then one that is not; how the first ended."""
        settings = self.hurt.settings(job.owner)
        secret = settings.s3_secret_key
        given = {"redis_url": str(settings.redis_url), "owner": job.owner, **self.hurt.on.s3.settings}
        given["s3_secret_key"] = secret.get_secret_value() if secret else ""
        asked = {"spec": self.spec(job), "token": job.token, "when": job.via}
        popen = subprocess.Popen(
            guarded([sys.executable, "-m", "tests.chaos.cut", json.dumps(asked)]),
            cwd=REPOSITORY,
            env=dict(os.environ) | {f"OVERPAINT_{name.upper()}": value for name, value in given.items()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            code = popen.wait(20)
        except subprocess.TimeoutExpired:
            popen.kill()
            code = popen.wait()
        self.submit(job)
        return f"{job.via}, status {code}"

    def _follow(self, job: PlannedJob, began: float) -> None:
        """Submit when the job before has ended."""
        self.over.wait(max(0.0, began + job.at - time.monotonic()))
        with self.hurt.on.redis.client() as client:
            while not self._ended(client, job.after):
                if self.over.wait(AGAIN_S):
                    return
        self.submit(job)

    def _ended(self, client: "redis.Redis", number: int | None) -> bool:
        job_id = self.accepted.get(-1 if number is None else number)
        with suppress(redis.RedisError):
            return job_id is not None and client.hget(f"op:job:{job_id}", "state") in TERMINAL
        return False

    # What else producers do

    def cancel(self, job: PlannedJob) -> str:
        """Cancel it once it is there."""
        while job.number not in self.accepted and not self.over.wait(0.05):
            pass
        if (job_id := self.accepted.get(job.number)) is None:
            return "never accepted"
        state = self._patiently(lambda: self._farms[job.owner].job(job_id).cancel(), (ServiceError,))
        self.cancelled.add(job.number)
        return str(state)

    def replay(self, pick: float) -> str:
        """Replay one of the jobs that have failed or died."""
        with self.hurt.on.redis.client() as client:
            bad = {job for state in ("failed", "dead") for job in client.zrange(f"op:state:{state}", 0, -1)}
        numbers = sorted(number for number, job_id in list(self.accepted.items()) if job_id in bad)
        if not numbers:
            return ""
        number = numbers[int(pick * len(numbers))]
        owner = self.plan.jobs[number].owner
        self._patiently(lambda: self._farms[owner].job(self.accepted[number]).replay(), (ServiceError,))
        self.replayed[number] += 1
        return self.accepted[number]

    def collect(self, min_age: timedelta = OLD) -> str:
        """What `overpaint gc` does, beside all."""
        farm = self._farms[OWNERS[0]]
        found = [
            each
            for each in garbage.find(farm.ledger, farm.store, min_age=min_age)
            if garbage.delete(farm.store, each)
        ]
        self.collected += len(found)
        return f"deleted {len(found)}"

    def _patiently(self, call: Callable[[], Any], passing: tuple[type[Exception], ...]) -> Any:
        """The answer, once there is one; None when all is over, or for an error that does not pass."""
        while not self.over.is_set():
            try:
                return call()
            except passing as error:
                self.refusals[type(error).__name__] += 1
            except OverpaintError as error:
                self.refusals[type(error).__name__] += 1
                return None
            except Exception as error:
                self.untyped.append(repr(error)[:300])
            self.over.wait(AGAIN_S)
        return None


def keep(path: Path, value: object) -> None:
    """Write for those who look into a broken campaign."""
    path.write_text(json.dumps(value, indent=1, default=str))
