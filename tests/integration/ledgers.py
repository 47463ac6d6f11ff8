"""What the ledger's tests share: a ledger on the test run's Redis, and a look behind it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import redis

from overpaint_shared.ledger import Event, Events, JobState, Ledger, Submission, Wakeup, WorkerRecord
from overpaint_shared.setting_views import LedgerSettings
from tests.waiting import wait_until


def ledger(url: str, **settings: Any) -> Ledger:
    """A ledger whose reaper acts at once, unless `settings` say otherwise: leases and graces of no length."""
    values = {"lease_s": 60.0, "reap_grace_s": 0.0} | settings
    return Ledger.connect(url, LedgerSettings(**values))


def reaper(url: str, **settings: Any) -> Ledger:
    """A ledger that does not hold because the test's Redis is young."""
    return ledger(url, **({"lease_s": 0.0} | settings))


def job(job_id: str, **values: Any) -> Submission:
    """A submission; only what the test is about needs saying."""
    defaults: dict[str, Any] = {
        "owner": "ann",
        "spec_json": '{"version":1}',
        "model": "sd15",
        "title": job_id,
    }
    return Submission(id=job_id, **(defaults | values))


def worker(worker_id: str, *models: str, features: Iterable[str] = ()) -> WorkerRecord:
    """A live worker."""
    return WorkerRecord(
        id=worker_id,
        name=f"name-of-{worker_id}",
        host="host",
        device="cpu",
        slots=4,
        version="1",
        models=models or ("sd15",),
        features=frozenset(features),
    )


def names(wakeups: Iterable[Wakeup]) -> list[str]:
    """The jobs of wake-ups."""
    return [wakeup.job_id for wakeup in wakeups]


def running(books: Ledger, job_id: str = "a", worker_id: str = "w1", **values: Any) -> int:
    """Submit and claim a job; its token."""
    books.submit([job(job_id, **values)])
    return books.claim(job_id, worker_id).token


def collect(events: Events, last: JobState) -> list[Event]:
    """Events up to the first in state `last`."""
    seen: list[Event] = []

    def ended() -> bool:
        event = events.poll(0.5)
        if event is not None:
            seen.append(event)
        return event is not None and event.state is last

    wait_until(ended, what=f"an event says {last}")
    return seen


def expire_lease(client: redis.Redis, job_id: str) -> None:
    """What time does to the lease of a worker that is gone."""
    client.zadd("op:leases", {job_id: 1.0}, xx=True)


class Books:
    """All of the ledger's keys, read raw, to hold the indexes against the records."""

    INDEXES = tuple(
        f"op:{name}"
        for name in (
            "state:",
            "owner:",
            "group:",
            "queued:",
            "wait:",
            "sent:",
            "leases",
            "lanes",
            "expiry",
            "deadlines",
        )
    )

    def __init__(self, client: redis.Redis, *, odd: bool = False) -> None:
        """`odd`: records that were put aside may be there, and the census may still count them."""
        keys = [key.decode() for key in client.keys("op:*")]
        records = [key for key in keys if key.startswith("op:job:")]
        if odd:
            records = [key for key in records if not client.hexists(key, "odd")]
        indexes = [key for key in keys if key.startswith(self.INDEXES)]
        pipe = client.pipeline(transaction=True)
        for key in records:
            pipe.hgetall(key)
        for key in indexes:
            pipe.zrange(key, 0, -1, withscores=True)
        uses = [key for key in keys if key.startswith("op:used:")]
        for key in uses:
            pipe.hgetall(key)
        pipe.hgetall("op:census")
        *rows, census = pipe.execute()
        self.used = {
            key.removeprefix("op:used:"): {name.decode(): int(value) for name, value in row.items()}
            for key, row in zip(uses, rows[len(records) + len(indexes) :], strict=True)
        }
        rows = rows[: len(records) + len(indexes)]
        self._odd = odd
        self.census = {name.decode(): int(jobs) for name, jobs in census.items()}
        self.records = {
            key.removeprefix("op:job:"): {name.decode(): value.decode() for name, value in fields.items()}
            for key, fields in zip(records, rows, strict=False)
        }
        self.sets = {
            key: {member.decode(): score for member, score in row}
            for key, row in zip(indexes, rows[len(records) :], strict=True)
        }

    def where(self, prefix: str) -> dict[str, list[str]]:
        """Which sets of a kind each job is in."""
        found: dict[str, list[str]] = defaultdict(list)
        for key, members in self.sets.items():
            if key.startswith(prefix):
                for member in members:
                    found[member].append(key.removeprefix(prefix))
        return found

    def check(self, window: int) -> None:
        """Every index says what the records say, and the window is kept."""
        records = self.records
        lanes = {
            job_id: f"{fields['class']}:{fields['model']}:{fields['owner']}"
            for job_id, fields in records.items()
        }
        queued = {job_id for job_id, fields in records.items() if fields["state"] == "queued"}
        leased = {
            job_id for job_id, fields in records.items() if fields["state"] in {"running", "cancelling"}
        }
        assert self.where("op:state:") == {job_id: [fields["state"]] for job_id, fields in records.items()}
        assert self.where("op:owner:") == {job_id: [fields["owner"]] for job_id, fields in records.items()}
        assert self.where("op:queued:") == {job_id: [records[job_id]["model"]] for job_id in queued}
        assert self._odd or self.census == Counter(
            f"{r['state']}|{r['model']}|{method(r)}" for r in records.values()
        )
        used: dict[str, dict[str, int]] = defaultdict(lambda: {"queued": 0, "bytes": 0})
        for job_id in queued:
            used[records[job_id]["owner"]]["queued"] += 1
            used[records[job_id]["owner"]]["bytes"] += int(records[job_id]["bytes"])
        assert self._odd or self.used == used
        timed = {job_id for job_id in queued if "deadline" in records[job_id]}
        assert timed <= set(self.sets.get("op:deadlines", {}))
        assert set(self.sets.get("op:deadlines", {})) <= queued | leased
        waiting, sent = self.where("op:wait:"), self.where("op:sent:")
        assert not set(waiting) & set(sent)
        assert waiting | sent == {job_id: [lanes[job_id]] for job_id in queued}
        assert set(self.sets.get("op:leases", {})) == leased
        expiring = set(self.sets.get("op:expiry", {}))
        assert (expiring & set(records) if self._odd else expiring) == set(records) - queued - leased
        assert {lane for kind in (waiting, sent) for (lane,) in kind.values()} <= set(
            self.sets.get("op:lanes", {})
        )
        self._check_window(sent, waiting, window)

    def _check_window(self, sent: dict[str, list[str]], waiting: dict[str, list[str]], window: int) -> None:
        places: dict[str, list[str]] = defaultdict(list)
        for job_id, (lane,) in sent.items():
            places[lane].append(job_id)
        for lane, members in places.items():  # those that had their turn come back beyond the window
            fresh = [job_id for job_id in members if not int(self.records[job_id].get("attempt", 0))]
            assert len(fresh) <= window, (lane, members)
        for (lane,) in waiting.values():
            assert len(places[lane]) >= window, f"a place of {lane} is free while jobs wait"


def method(fields: Mapping[str, str]) -> str:
    """The method that a record's features name."""
    named = [one for one in fields.get("features", "").split(",") if one.startswith("method:")]
    return named[0].removeprefix("method:") if named else ""


def states(books: Ledger, *job_ids: str) -> list[JobState]:
    """The states of jobs."""
    found = [books.job(job_id) for job_id in job_ids]
    return [record.state for record in found if record is not None]
