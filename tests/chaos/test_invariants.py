"""Each invariant is broken once, to see that the inspector tells it."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overpaint_shared.ledger import Cancelled, Done, Ledger, ReleaseReason
from overpaint_shared.store import Store
from tests.chaos.farm import Hurt, Workers
from tests.chaos.invariants import Inspector
from tests.chaos.plan import Plan, PlannedJob, Shape
from tests.chaos.producers import Producers
from tests.shipped import QUICK, Shipped

USUAL: dict[str, Any] = {
    "at": 0.0,
    "owner": "ann",
    "model": "alpha",
    "priority": 5,
    "steps": 3,
    "step_s": 0.0,
}
JOBS = (
    PlannedJob(number=0, picture=0, key="kept.png", **USUAL),
    PlannedJob(number=1, picture=1, key="kept.png", after=0, **USUAL),
    PlannedJob(number=2, picture=2, does="kill", **USUAL),
    PlannedJob(number=3, picture=3, does="cancel", **USUAL),
)


class World:
    """A farm whose jobs have ended as they should. No worker was there: its part is done by hand."""

    def __init__(self, shipped: Shipped, folder: Path) -> None:
        self.hurt = Hurt(folder, QUICK, servers=shipped)
        self.hurt.workers = Workers(None, [])  # type: ignore[arg-type]
        self.plan = Plan(0, Shape.short(4, 30), JOBS, ())
        self.producers = Producers(self.hurt, self.plan)
        settings = shipped.settings("worker")
        self.ledger, self.store = (
            Ledger.connect(settings.redis_url, settings.ledger()),
            Store(settings.store()),
        )
        self.client, self.s3 = shipped.redis.client(), shipped.s3.client()
        self.bucket = settings.s3_bucket
        self.ledger.load_scripts()  # a worker's part
        self.producers.prepare()
        for job in JOBS:
            self.producers.submit(job)
            (self.render, self.render, self.die, self.stop)[job.number](job)
        for key in self.client.scan_iter("m.*"):
            self.client.delete(key)

    def id(self, number: int) -> str:
        return self.producers.accepted[number]

    def render(self, job: PlannedJob) -> None:
        job_id, data = self.id(job.number), self.producers.expected(job)
        token = self.ledger.claim(job_id, "hand").token
        key = self.store.put_result(job_id, token, "image.png", data, "image/png")
        self.s3.put_object(Bucket=self.bucket, Key=f"named/ann/{job.key}", Body=data)
        assert self.ledger.finish(job_id, token, Done({"files": {"image.png": key}, "summary": {}})).accepted

    def die(self, job: PlannedJob) -> None:
        for _ in range(4):
            token = self.ledger.claim(self.id(job.number), "hand").token
            self.ledger.release(self.id(job.number), token, ReleaseReason.CRASHED, "killed")

    def stop(self, job: PlannedJob) -> None:
        token = self.ledger.claim(self.id(job.number), "hand").token
        self.ledger.cancel(self.id(job.number))
        assert self.ledger.finish(self.id(job.number), token, Cancelled()).accepted

    def broken(self) -> list[str]:
        return Inspector(self.hurt, self.plan, self.producers, {}).inspect().broken

    def life(self, *lines: dict[str, Any], code: int = 0, hurt: str | None = "end") -> None:
        """A worker that said these lines and ended so."""
        log = self.hurt.folder / "life.log"
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        process = SimpleNamespace(
            log=log,
            lines=list(lines),
            said=lambda action: [line for line in lines if line.get("action") == action],
        )
        life = SimpleNamespace(
            process=process, code=code, hurt=hurt, unasked=hurt is None, began=1.0, ended=2.0
        )
        self.hurt.workers.slots = [SimpleNamespace(lives=[life])]  # type: ignore[list-item]

    def end(self) -> None:
        self.producers.close()
        self.ledger.close()
        self.client.close()
        self.s3.close()


@pytest.fixture
def world(shipped: Shipped, tmp_path: Path) -> Iterator[World]:
    made = World(shipped, tmp_path)
    yield made
    made.end()


def test_a_farm_that_did_all_well_breaks_nothing(world: World) -> None:
    world.life({"action": "job.done", "job": world.id(0), "token": 1})
    assert world.broken() == []


def _key(world: World, number: int) -> str:
    result = json.loads(world.client.hget(f"op:job:{world.id(number)}", "result") or "")
    return str(result["files"]["image.png"])


def _put(world: World, key: str, data: bytes) -> None:
    world.s3.put_object(Bucket=world.bucket, Key=key, Body=data)


def _twice(world: World) -> None:
    world.life(*({"action": "job.done", "job": world.id(0), "token": token} for token in (1, 2)))


def _other_token(world: World) -> None:
    world.client.hset(f"op:job:{world.id(0)}", "token", "1")


SPOILED: dict[str, tuple[Callable[[World], object], str]] = {
    "a record is gone": (lambda w: w.client.delete(f"op:job:{w.id(0)}"), "is gone"),
    "an innocent is dead": (lambda w: w.client.hset(f"op:job:{w.id(0)}", "state", "dead"), "is dead"),
    "a poison is done": (lambda w: w.client.hset(f"op:job:{w.id(2)}", "state", "done"), "is done"),
    "a job was never accepted": (lambda w: w.producers.accepted.pop(3), "never accepted"),
    "a job is nobody's": (lambda w: w.client.hset("op:job:more", "state", "done"), "nobody submitted"),
    "two attempts committed": (_twice, "committed twice"),
    "another attempt's files": (_other_token, "shows files of tokens"),
    "another job's picture": (lambda w: _put(w, _key(w, 0), b"another"), "is not its picture"),
    "a picture is gone": (lambda w: w.s3.delete_object(Bucket=w.bucket, Key=_key(w, 0)), "is not in S3"),
    "the earlier job's picture under a name": (
        lambda w: _put(w, "named/ann/kept.png", w.producers.expected(JOBS[0])),
        "is not the picture of job 1",
    ),
    "an index knows another job": (lambda w: w.client.zadd("op:state:queued", {w.id(0): 1}), "an index"),
    "the census counts one more": (lambda w: w.client.hincrby("op:census", "done|alpha|", 1), "an index"),
    "a lease is left": (lambda w: w.client.zadd("op:leases", {w.id(0): 1}), "an index"),
    "a pace is left": (lambda w: w.client.hset("op:pace:since", "alpha", "1"), "the pace"),
    "a message is left": (lambda w: w.client.lpush("m.alpha", "x"), "messages are left"),
    "a file is left": (lambda w: _put(w, "results/nobody/1/image.png", b"x"), "are left, or missing"),
    "a worker ended by itself": (lambda w: w.life(code=1, hurt=None), "ended by itself"),
    "a worker left at its start though no server was away": (
        lambda w: w.life(code=3, hurt=None),
        "ended by itself",
    ),
    "a worker did not stop well": (lambda w: w.life(code=1, hurt="worker.stop"), "asked to stop"),
    "a defect in a log": (lambda w: w.life({"action": "reaper.unexpected"}), "reaper.unexpected"),
    "an error without a type": (lambda w: w.producers.untyped.append("KeyError"), "without a type"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_wrong_is_told(world: World, what: str) -> None:
    spoil, words = SPOILED[what]
    spoil(world)
    assert any(words in one for one in world.broken()), world.broken()


def test_a_process_that_is_left_is_told(world: World) -> None:
    left = subprocess.Popen([sys.executable, "-c", "input()", str(world.hurt.folder)], stdin=subprocess.PIPE)
    try:
        assert any("processes are left" in one for one in world.broken())
    finally:
        left.communicate(b"\n")
