"""What must hold when all is over, seen from outside: in Redis, in S3, in logs and among processes."""

import json
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from overpaint_shared.errors import EXIT_SERVICE
from overpaint_shared.setting_views import LedgerSettings
from tests.chaos.farm import Hurt, Life
from tests.chaos.faults import ODD
from tests.chaos.plan import POISONS, Plan, PlannedJob
from tests.chaos.producers import Producers
from tests.integration.ledgers import Books

ENDS = {
    "render": {"done"},
    "fail": {"failed"},
    "cancel": {"cancelled", "done"},
    **{poison: {"dead"} for poison in POISONS},
}
"""How each kind of job must end."""
LEVELS = 1
"""8-bit levels by which a job's picture may differ from its picture alone, in float32."""


@dataclass
class Verdict:
    """What was found: how many of what, and every invariant that is broken, in words."""

    states: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    twice: int = 0
    innocents_dead: int = 0
    poison_dead: int = 0
    poison: int = 0
    unasked: int = 0
    refused_starts: int = 0
    """Workers that left because a server was away when they started, to be started again."""
    defects: int = 0
    broken: list[str] = field(default_factory=list)


class Inspector:
    """Looks at a farm whose jobs have ended and whose workers have left."""

    def __init__(
        self,
        hurt: Hurt,
        plan: Plan,
        producers: Producers,
        references: dict[int, bytes],
        outages: Sequence[tuple[float, float]] = (),
    ) -> None:
        self.hurt, self.plan, self.producers, self.references = hurt, plan, producers, references
        self.outages = outages
        self.verdict = Verdict()
        with hurt.on.redis.client() as client:
            _without_odd(client)
            self.records = {
                key.removeprefix("op:job:"): client.hgetall(key)
                for key in client.scan_iter("op:job:*", count=1000)
            }
        self.s3, self.bucket = hurt.on.s3.client(), hurt.on.s3.settings["s3_bucket"]

    def inspect(self) -> Verdict:
        """Everything."""
        self._jobs()
        self._commits()
        self._results()
        self._names()
        self._indexes()
        self._workers()
        self._leftovers()
        return self.verdict

    def _break(self, words: str) -> None:
        self.verdict.broken.append(words)

    def _accepted(self) -> Iterator[tuple[PlannedJob, str, dict[str, str]]]:
        for number, job_id in sorted(self.producers.accepted.items()):
            if number < 0:  # a reference, rendered before all
                continue
            yield self.plan.jobs[number], job_id, self.records.get(job_id, {})

    # Jobs

    def _jobs(self) -> None:
        verdict = self.verdict
        for job, job_id, record in self._accepted():
            state = record.get("state", "gone")
            verdict.states[state] += 1
            verdict.poison += job.does in POISONS
            verdict.poison_dead += job.does in POISONS and state == "dead"
            verdict.lost += state in {"gone", "queued", "running", "cancelling"}
            verdict.innocents_dead += job.innocent and state in {"dead", "failed"}
            if state not in ENDS[job.does]:
                self._break(f"{_shown(job, job_id)} is {state}: {record.get('error') or record.get('fault')}")
        never = {job.number for job in self.plan.jobs} - set(self.producers.accepted)
        if never:
            self._break(f"{len(never)} jobs were never accepted: {sorted(never)[:10]}")
        if more := set(self.records) - set(self.producers.accepted.values()):
            self._break(f"{len(more)} jobs that nobody submitted: {sorted(more)[:5]}")
        for error, count in Counter(self.producers.untyped).items():
            self._break(f"a producer got an error without a type, {count} times: {error}")

    def _commits(self) -> None:
        """Each done job shows its committed token's files, and one attempt alone says that it committed."""
        said = defaultdict(set)
        for life in self.hurt.workers.lives:
            for line in life.process.said("job.done"):
                said[line["job"]].add(line["token"])
        for job, job_id, record in self._accepted():
            if len(said[job_id]) > 1:
                self.verdict.twice += 1
                self._break(f"{_shown(job, job_id)} was committed twice: tokens {sorted(said[job_id])}")
            if record.get("state") == "done":
                shown = {key.split("/")[2] for key in _files(record).values()}
                if shown != {record["token"]}:
                    self._break(f"{_shown(job, job_id)} shows files of tokens {shown}, not {record['token']}")

    # Results

    def _results(self) -> None:
        for job, job_id, record in self._accepted():
            if record.get("state") != "done":
                continue
            for name, key in _files(record).items():
                data = self._object(key)
                if data is None:
                    self._break(f"{_shown(job, job_id)}: {key} is not in S3")
                elif name == "image.png" and not self._right(job, data):
                    self._break(f"{_shown(job, job_id)}: {key} is not its picture")

    def _right(self, job: PlannedJob, data: bytes) -> bool:
        if not job.real:
            return data == self.producers.expected(job)
        mine, alone = (
            np.asarray(Image.open(BytesIO(each)), int) for each in (data, self.references[job.number])
        )
        return mine.shape == alone.shape and int(abs(mine - alone).max()) <= LEVELS

    def _names(self) -> None:
        """Under a name is the picture of the last job of that name that is done."""
        last: dict[tuple[str, str], PlannedJob] = {}
        for job, _, record in self._accepted():
            if job.key and record.get("state") == "done":
                last[job.owner, job.key] = job
        for (owner, key), job in last.items():
            if self._object(f"named/{owner}/{key}") != self.producers.expected(job):
                self._break(f"named/{owner}/{key} is not the picture of job {job.number}")

    def _object(self, key: str) -> bytes | None:
        try:
            return bytes(self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read())
        except self.s3.exceptions.NoSuchKey:
            return None

    def _keys(self, prefix: str) -> set[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {found["Key"] for page in pages for found in page.get("Contents", [])}

    # Indexes, processes, leftovers

    def _indexes(self) -> None:
        with self.hurt.on.redis.client(decode_responses=False) as client:
            try:
                Books(client).check(LedgerSettings().window)
            except (AssertionError, LookupError):
                self._break(f"an index does not say what the records say: {traceback.format_exc()[-900:]}")
            left = [key.decode() for key in client.scan_iter("op:pace:leased:*")]
            if left or client.hlen("op:pace:since"):
                self._break(f"the pace counts jobs that run: {left}, {client.hgetall('op:pace:since')}")
            if queues := [key.decode() for key in client.scan_iter("m.*") if client.type(key) == b"list"]:
                self._break(f"messages are left in {queues}")
        # Who finds no scripts, as after a restart of Redis, asks once whether it may load them.
        if denied := self.hurt.on.redis.denied() - {"producer: script|load"}:
            self._break(f"Redis denied its users: {sorted(denied)}")

    def _workers(self) -> None:
        for life in self.hurt.workers.lives:
            name, code = life.process.log.stem, life.code
            if life.unasked and self._refused(life):
                self.verdict.refused_starts += 1
            elif life.unasked:
                self.verdict.unasked += 1
                self._break(f"{name} ended by itself, status {code}: {life.process.log.read_text()[-300:]}")
            elif life.hurt in {"worker.stop", "end"} and code != 0:
                self._break(f"{name} was asked to stop and left with status {code}")
            for line in life.process.lines:
                if str(line.get("action", "")).endswith(".unexpected"):
                    self.verdict.defects += 1
                    self._break(f"{name}: {json.dumps(line)[:600]}")
        if orphans := self.hurt.orphans():
            self._break(f"processes are left: {orphans}")

    def _refused(self, life: Life) -> bool:
        """Whether it left at its start, with the status that says that a server is away, and one was."""
        away = any(first < (life.ended or 0) and last > life.began for first, last in self.outages)
        return away and life.code == EXIT_SERVICE and not life.process.said("worker.started")

    def _leftovers(self) -> None:
        """When the garbage is collected, nothing is left but what records name."""
        self.producers.collect(timedelta(0))
        shown = {key for record in self.records.values() for key in _files(record).values()}
        if odd := self._keys("results/") ^ shown:
            self._break(f"{len(odd)} objects are left, or missing: {sorted(odd)[:5]}")


def _files(record: dict[str, str]) -> dict[str, str]:
    result: dict[str, Any] = json.loads(record.get("result") or "{}")
    return dict(result.get("files", {}))


def _shown(job: PlannedJob, job_id: str) -> str:
    return f"job {job.number} {job_id} ({job.does}, {job.model}, by {job.via})"


def _without_odd(client: Any) -> None:
    """Take away what the faults put there and the farm need not remove: keys of odd names."""
    for key in client.scan_iter(f"op:*{ODD}*", count=1000):
        client.delete(key)
    client.srem(
        "op:workers", *[name for name in client.smembers("op:workers") if name.startswith(ODD)] or [""]
    )
