"""Reading the ledger: records, listings, counts. Nothing here changes a job.

Without MULTI: a full Redis 6.2 refuses whatever stands in a transaction, even where it only reads.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from typing import Any, Final

import redis
from redis.exceptions import ResponseError

from overpaint_shared.errors import DamagedRecord, shorten
from overpaint_shared.ledger.records import JobRecord
from overpaint_shared.ledger.states import JobState
from overpaint_shared.ledger.tolerance import answers, json_object, number, tolerated

_CHUNK: Final = 200
Fields = Mapping[str, str]
Client = Any  # redis-py types each reply for all modes of a client at once; ours decodes


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records a listing wants; None and empty mean any."""

    owner: str | None
    states: frozenset[JobState] | None
    group: str | None
    model: str | None
    labels: Mapping[str, str]

    def indexes(self) -> list[str]:
        """The sorted sets that together hold every wanted job, the smallest choice."""
        if self.group is not None and self.owner is not None:
            return [f"op:group:{self.owner}:{self.group}"]
        if self.owner is not None and self.states is None:
            return [f"op:owner:{self.owner}"]
        return [f"op:state:{state}" for state in self.states or JobState]

    def wants(self, record: JobRecord) -> bool:
        """Whether `record` is one of them."""
        return (
            (self.owner is None or record.owner == self.owner)
            and (self.states is None or record.state in self.states)
            and (self.group is None or record.group == self.group)
            and (self.model is None or record.model == self.model)
            and all(record.labels.get(name) == value for name, value in self.labels.items())
        )


def queued_index(model: str) -> str:
    """The sorted set of a model's queued jobs."""
    return f"op:queued:{model}"


def states(state: JobState | Collection[JobState] | None) -> frozenset[JobState] | None:
    """One state, several, or any."""
    if state is None:
        return None
    return frozenset({state}) if isinstance(state, JobState) else frozenset(state)


def job(client: Client, job_id: str) -> JobRecord | None:
    """One record with its spec. Raises DamagedRecord for one that cannot be read."""
    with client.pipeline(transaction=False) as pipe:
        pipe.hgetall(f"op:job:{job_id}")
        pipe.get(f"op:spec:{job_id}")
        fields, spec = answers(pipe)
    if fields is None:
        raise damaged(job_id, "it is no record")
    return record(job_id, fields, spec) if fields else None


def damaged(job_id: str, why: str) -> DamagedRecord:
    """The error for a record that cannot be used."""
    return DamagedRecord(
        f"the record of job {job_id} is damaged: {why}",
        field="job",
        value=job_id,
        fix="submit the job again; op:quarantine in Redis has what was found",
    )


def jobs(client: Client, wanted: Filter, limit: int) -> list[JobRecord]:
    """At most `limit` wanted records, newest first."""
    found: list[JobRecord] = []
    seen: set[str] = set()  # a job that changes state while we read may be met twice
    for ids in _chunked(_newest(client, wanted.indexes())):
        fresh = [job_id for job_id in ids if job_id not in seen]
        seen.update(fresh)
        found += [one for one in records(client, fresh) if wanted.wants(one)]
        if len(found) >= limit:
            break
    return found[:limit]


def _newest(client: Client, indexes: list[str]) -> Iterator[str]:
    """The ids of several indexes, newest first."""
    streams = (_descending(client, index) for index in indexes)
    return (job_id for _, job_id in merge(*streams, key=lambda row: row[0], reverse=True))


def _descending(client: Client, index: str) -> Iterator[tuple[float, str]]:
    """One index from its newest entry on, read in chunks by rank."""
    start = 0
    while rows := tolerated(client.zrevrange, index, start, start + _CHUNK - 1, withscores=True):
        for job_id, created in rows:
            yield float(created), str(job_id)
        start += len(rows)


def _chunked(ids: Iterator[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for job_id in ids:
        chunk.append(job_id)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def group(client: Client, owner: str, name: str) -> list[str]:
    """The ids of a group's jobs, oldest first."""
    return list(tolerated(client.zrange, f"op:group:{owner}:{name}", 0, -1) or ())


def records(client: Client, ids: list[str], *, specs: bool = False) -> list[JobRecord]:
    """Those of the records that are there and can be read."""
    try:
        return _records(client, ids, specs)
    except redis.ConnectionError:
        # Redis closes a connection whose answer is too long; a producer may have written long fields.
        if len(ids) < 2:
            raise
        client.ping()  # raises where Redis is away
        half = len(ids) // 2
        return records(client, ids[:half], specs=specs) + records(client, ids[half:], specs=specs)


def _records(client: Client, ids: list[str], specs: bool) -> list[JobRecord]:
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hgetall(f"op:job:{job_id}")
        for job_id in ids if specs else ():
            pipe.get(f"op:spec:{job_id}")
        rows = answers(pipe)
    texts = rows[len(ids) :] or [None] * len(ids)
    found = map(_readable, ids, rows[: len(ids)], texts)
    return [one for one in found if one is not None]


def _readable(job_id: str, fields: Fields | None, spec_json: str | None) -> JobRecord | None:
    try:
        return record(job_id, fields, spec_json) if fields else None
    except DamagedRecord:
        return None


def record(job_id: str, fields: Fields, spec_json: str | None = None) -> JobRecord:
    """The value of a record's hash. Fields that were never set have their defaults. Raises DamagedRecord."""
    if "odd" in fields:
        raise damaged(job_id, fields["odd"])
    try:
        return _record(job_id, fields, spec_json)
    except (KeyError, ValueError, OverflowError) as error:
        raise damaged(job_id, f"{type(error).__name__}: {shorten(str(error))}") from error


def _record(job_id: str, fields: Fields, spec_json: str | None) -> JobRecord:
    return JobRecord(
        id=job_id,
        owner=fields["owner"],
        state=JobState(fields["state"]),
        model=fields["model"],
        priority=int(fields["priority"]),
        priority_class=int(fields["class"]),
        title=fields.get("title", ""),
        features=_names(fields.get("features")),
        group=fields.get("group"),
        labels=_texts(fields.get("labels")),
        submit_token=fields.get("submit_token"),
        created=_seconds(fields["created"]) or 0.0,
        since=_seconds(fields["since"]) or 0.0,
        started=_seconds(fields.get("started")),
        ended=_seconds(fields.get("ended")),
        attempt=int(fields.get("attempt", 0)),
        crashes=int(fields.get("crashes", 0)),
        lost_hosts=int(fields.get("lost", 0)),
        token=int(fields.get("token", 0)),
        worker=fields.get("worker"),
        worker_name=fields.get("worker_name"),
        lease=_seconds(fields.get("lease")),
        stage=fields.get("stage"),
        step=_step(fields.get("step")),
        of=_step(fields.get("of")),
        result=json_object(fields.get("result")),
        error=json_object(fields.get("error")),
        fault=fields.get("fault"),
        excluded=_names(fields.get("excluded")),
        deadline=_seconds(fields.get("deadline")),
        naming=bool(fields.get("naming")),
        spec_json=spec_json,
    )


def _names(text: str | None) -> frozenset[str]:
    return frozenset(filter(None, (text or "").split(",")))


def _seconds(text: str | None) -> float | None:
    """A time. Raises ValueError for what is none."""
    if not text:
        return None
    if (value := number(text)) is None:
        raise ValueError(f"{text!r} is no time")
    return value


def _step(text: str | None) -> int:
    """Progress decides nothing, so what cannot be read is none."""
    return int(number(text) or 0)


def _texts(text: str | None) -> dict[str, str]:
    return {str(name): str(value) for name, value in (json_object(text) or {}).items()}


def counts(client: Client) -> dict[JobState, int]:
    """How many records are in each state."""
    with client.pipeline(transaction=False) as pipe:
        for state in JobState:
            pipe.zcard(f"op:state:{state}")
        return {state: jobs or 0 for state, jobs in zip(JobState, answers(pipe), strict=True)}


def depth(client: Client, model: str | None) -> int:
    """How many jobs are queued."""
    index = f"op:state:{JobState.QUEUED}" if model is None else queued_index(model)
    return int(tolerated(client.zcard, index) or 0)


def oldest_waiting(client: Client, model: str) -> float | None:
    """Seconds that the oldest queued job of `model` has waited."""
    with client.pipeline(transaction=False) as pipe:
        pipe.zrange(queued_index(model), 0, 0, withscores=True)
        pipe.time()
        oldest, (seconds, microseconds) = answers(pipe)
    if not oldest:
        return None
    now = float(seconds + microseconds / 1e6)
    return max(0.0, now - float(oldest[0][1]))


def clock(client: Client) -> float:
    """The time of Redis."""
    seconds, microseconds = client.time()
    return float(seconds + microseconds / 1e6)


def refuse_cluster(client: Client) -> None:
    """Raise Redis' own kind of error on a Redis Cluster."""
    server = client.info("server")
    if "cluster" in (server.get("redis_mode"), server.get("server_mode")):  # Redis' name of it, and Valkey's
        raise ResponseError("cluster mode is on")
