"""One seed, from a farm's start to its verdict."""

import heapq
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import redis

from overpaint_shared.ledger import TERMINAL
from overpaint_shared.setting_views import LedgerSettings
from tests.chaos.farm import Hurt
from tests.chaos.faults import ODD, Faults, Hit
from tests.chaos.invariants import Inspector, Verdict
from tests.chaos.plan import Plan, PlannedJob
from tests.chaos.producers import Producers, keep
from tests.chaos.recovery import Waits, after_engines, after_hosts, attempts, outages
from tests.shipped import QUICK
from tests.waiting import wait_until

READY_S = 180.0
AGAIN_S, AGAIN_FOR_S = 0.5, 10.0
"""How often, and for how long, a fault looks for somebody to hit."""


@dataclass
class Result:
    """What one seed came to."""

    plan: Plan
    verdict: Verdict
    hits: list[Hit]
    hosts: Waits
    engines: Waits
    real_engines: Waits
    seconds: float

    @property
    def happened(self) -> Counter[str]:
        """How often each kind of fault happened."""
        return Counter(hit.fault.kind for hit in self.hits if not hit.missed)

    @property
    def missed(self) -> Counter[str]:
        """How often there was nothing to hurt."""
        return Counter(hit.fault.kind for hit in self.hits if hit.missed)


class Campaign:
    """One farm, hurt by one plan. Run it in a thread that outlives it."""

    def __init__(
        self, plan: Plan, folder: Path, say: Callable[[str], None] = lambda _: None, real: int = 0
    ) -> None:
        self.plan, self.folder, self.say = plan, folder, say
        lease = _lease(plan)
        self.hurt = Hurt(folder, lease, real)
        self.producers = Producers(self.hurt, plan)
        self.references: dict[int, bytes] = {}

    def run(self) -> Result:
        """All of it. The processes are gone then, the folder is not."""
        began = time.monotonic()
        (self.folder / "plan.json").write_text(self.plan.to_json())
        try:
            self._start()
            self._hurt()
            self._wait()
            return self._verdict(began)
        finally:
            self.producers.close()
            self.hurt.end()

    def _start(self) -> None:
        self.hurt.start()
        self.producers.prepare()
        wait_until(
            lambda: all(slot.open for slot in self.hurt.workers.slots), READY_S, "all workers are open"
        )
        self._render_references()
        self.faults = Faults(self.hurt, self.producers)

    def _render_references(self) -> None:
        """The real engine's pictures before anything is hurt."""
        real = [job for job in self.plan.jobs if job.real]
        if not real:
            return
        first = {(job.steps, job.picture): job for job in real}
        for job in first.values():
            self.producers.submit(_reference(job))
        wait_until(
            lambda: self._left({-1 - job.number for job in first.values()}) == 0,
            READY_S,
            "the references are rendered",
        )
        with self.hurt.on.redis.client() as client:
            for job in real:
                one = first[job.steps, job.picture]
                job_id = self.producers.accepted[-1 - one.number]
                self.references[job.number] = _picture(self.hurt, client, job_id)

    def _hurt(self) -> None:
        """The plan's time."""
        zero = time.monotonic()
        self.producers.start(zero)
        never = threading.Event()
        moments = [(fault.at, fault.number, fault) for fault in self.plan.faults]
        heapq.heapify(moments)
        begun: dict[int, Hit] = {}
        while moments:
            moment, number, fault = heapq.heappop(moments)
            never.wait(max(0.0, zero + moment - time.monotonic()))
            if number in begun:
                self.faults.end(begun[number])
                continue
            hit = self.faults.begin(fault)
            if hit.missed and moment < fault.at + AGAIN_FOR_S:  # whom it would hit is down already
                self.faults.hits.remove(hit)
                heapq.heappush(moments, (moment + AGAIN_S, number, fault))
                continue
            begun[number] = hit
            if fault.seconds:
                heapq.heappush(moments, (moment + fault.seconds, number, fault))
            if len(begun) % 10 == 0:
                self._tell(zero)

    def _tell(self, zero: float) -> None:
        accepted = self.producers.accepted
        left = self._left(set(accepted))
        self.say(
            f"{time.monotonic() - zero:5.0f} s  {len(accepted)} accepted, "
            f"{'?' if left is None else len(accepted) - left} ended, {len(self.faults.hits)} faults, "
            f"{len(self.hurt.workers.lives)} workers started"
        )

    def _left(self, numbers: set[int]) -> int | None:
        """How many of these jobs have not ended; None while Redis does not say."""
        ids = [self.producers.accepted.get(number) for number in numbers]
        try:
            with self.hurt.on.redis.client(socket_timeout=2) as client, client.pipeline(False) as pipe:
                for job_id in ids:
                    pipe.hget(f"op:job:{job_id}", "state")
                return sum(state not in TERMINAL for state in pipe.execute())
        except redis.RedisError:
            return None

    def _wait(self) -> None:
        """Until all jobs have ended and nothing is left. If that takes too long, the verdict shows it."""
        zero = time.monotonic()
        every = {job.number for job in self.plan.jobs}
        last = 0.0
        while time.monotonic() < zero + self.plan.shape.end_s:
            if not self.faults.pending and self._left(every) == 0 and not self._leftovers():
                break
            if time.monotonic() > last + 15:
                last = time.monotonic()
                self._tell(zero)
            time.sleep(0.1)
        self.producers.over.set()
        self.faults.close()

    def _leftovers(self) -> bool:
        """Whether workers and reapers still have something to take away."""
        with self.hurt.on.redis.client() as client:
            sets = [
                "op:leases",
                "op:expiry",
                *client.scan_iter("op:sent:*"),
                *client.scan_iter("op:queued:*"),
            ]
            odd = [name for key in sets for name, _ in client.zscan_iter(key, f"{ODD}*")]
            lists = [key for key in client.scan_iter("m.*", count=1000) if client.type(key) == "list"]
            return bool(odd or lists or client.zcard("op:leases"))

    def _verdict(self, began: float) -> Result:
        self.say(f"{len(self.producers.accepted)} jobs accepted; the workers stop")
        keep(self.folder / "faults.json", [hit.to_json() for hit in self.faults.hits])
        keep(self.folder / "jobs.json", self.producers.accepted)
        self.hurt.workers.stop()
        inspector = Inspector(
            self.hurt, self.plan, self.producers, self.references, outages(self.faults.hits)
        )
        keep(self.folder / "records.json", inspector.records)
        verdict = inspector.inspect()
        verdict.broken += [
            f"{hit.fault.kind}: {hit.said}" for hit in self.faults.hits if "UNEXPECTED" in hit.said
        ]
        lives, hits = self.hurt.workers.lives, self.faults.hits
        found = attempts(lives)
        return Result(
            self.plan,
            verdict,
            hits,
            hosts=after_hosts(hits, found, self.plan.shape.lease_s),
            engines=after_engines(lives, hits, found, real=False),
            real_engines=after_engines(lives, hits, found, real=True),
            seconds=time.monotonic() - began,
        )


def _lease(plan: Plan) -> dict[str, float]:
    """Every time that a settings file could change, as the plan wants it."""
    usual = LedgerSettings()
    if plan.shape.lease_s != usual.lease_s:
        return QUICK | {"lease_s": plan.shape.lease_s, "unable_after_s": usual.unable_after_s}
    return {name: getattr(usual, name) for name in QUICK}


def _reference(job: PlannedJob) -> PlannedJob:
    """The same job, to be rendered before anything is hurt."""
    return replace(job, number=-1 - job.number, key=None)


def _picture(hurt: Hurt, client: "redis.Redis", job_id: str) -> bytes:
    result = json.loads(client.hget(f"op:job:{job_id}", "result") or "{}")
    found = hurt.on.s3.client().get_object(
        Bucket=hurt.on.s3.settings["s3_bucket"], Key=result["files"]["image.png"]
    )
    return bytes(found["Body"].read())


def campaign(plan: Plan, folder: Path, say: Callable[[str], None], real: int = 0) -> Result:
    """Run one; its folder goes if nothing is broken."""
    folder.mkdir(parents=True)
    result = Campaign(plan, folder, say, real).run()
    keep(folder / "broken.json", result.verdict.broken)
    if not result.verdict.broken:
        shutil.rmtree(folder, ignore_errors=True)
    return result
