"""The live workers, as they announce themselves."""

import json
from collections.abc import Mapping
from contextlib import suppress
from types import UnionType
from typing import Any, Final

from redis.exceptions import ResponseError

from overpaint_shared.ledger.records import WorkerRecord
from overpaint_shared.ledger.tolerance import answers, json_object, tolerated

QUARANTINE: Final = "op:quarantine"
QUARANTINED: Final = 100
LONGEST: Final = 400
"""As in `guard.lua`."""

KINDS: Final[Mapping[str, type | UnionType]] = {
    **dict.fromkeys(("id", "name", "host", "device", "version", "device_name"), str),
    **dict.fromkeys(("slots", "running"), int),
    **dict.fromkeys(("memory_total", "memory_used"), int | None),
    "started": int | float,
    "steps_per_s": int | float | None,
    "loaded": str | None,
    "more": dict,
}
MEMBERS: Final[Mapping[str, type]] = {
    "catalogue": dict,
    **dict.fromkeys(("features", "models", "warm", "jobs"), str),
}

Client = Any  # as in listing.py


def workers(client: Client, *, tidy: bool = False) -> tuple[list[WorkerRecord], dict[str, str]]:
    """The live workers, by name, and why the records of others cannot be read, by id.

    `tidy`: names of dead ones are dropped from the index. That is for workers; others may only look.
    """
    ids = sorted(tolerated(client.smembers, "op:workers") or ())
    with client.pipeline(transaction=False) as pipe:
        for worker_id in ids:
            pipe.hgetall(f"op:worker:{worker_id}")
        rows = answers(pipe)
    found = dict(zip(ids, rows, strict=True))
    dead = [worker_id for worker_id, row in found.items() if row == {}]
    if dead and tidy:  # one that announces itself in this moment does so again soon
        with suppress(ResponseError):  # a server that takes no writes now
            client.srem("op:workers", *dead)
    live: list[WorkerRecord] = []
    odd: dict[str, str] = {}
    for worker_id, row in found.items():
        if row == {}:
            continue
        try:
            live.append(_worker(worker_id, row))
        except (TypeError, ValueError) as error:
            odd[worker_id] = f"is no record of a worker: {error}"
    return sorted(live, key=lambda worker: (worker.name, worker.id)), odd


def _worker(worker_id: str, row: dict[str, str] | None) -> WorkerRecord:
    """The record that a hash holds. Raises TypeError or ValueError."""
    data = json_object((row or {}).get("record"))
    if data is None:
        raise ValueError("it is no JSON object")
    record = WorkerRecord.from_json(data)
    if record.id != worker_id:
        raise ValueError(f"it bears the id {record.id!r}")
    for name, kinds in KINDS.items():
        if not isinstance(getattr(record, name), kinds):
            raise TypeError(f"its {name} is {getattr(record, name)!r}")
    for name, kind in MEMBERS.items():
        if not all(isinstance(member, kind) for member in getattr(record, name)):
            raise TypeError(f"its {name} are {getattr(record, name)!r}")
    return record


def put_aside(client: Client, worker_id: str, why: str) -> None:
    """Forget a worker whose record cannot be read; a live one announces itself anew."""
    entry = {"reason": f"op:worker:{worker_id} {why}"[:LONGEST], "item": worker_id[:LONGEST]}
    with suppress(ResponseError), client.pipeline(transaction=True) as pipe:  # a full Redis: later, then
        pipe.lpush(QUARANTINE, json.dumps(entry))
        pipe.ltrim(QUARANTINE, 0, QUARANTINED - 1)
        pipe.delete(f"op:worker:{worker_id}")
        pipe.srem("op:workers", worker_id)
        pipe.execute()


def retire(client: Client, worker_id: str) -> None:
    """Forget a worker."""
    with client.pipeline(transaction=True) as pipe:
        pipe.delete(f"op:worker:{worker_id}")
        pipe.srem("op:workers", worker_id)
        pipe.execute()
