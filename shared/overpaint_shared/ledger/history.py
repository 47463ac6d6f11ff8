"""Reading how the attempts at a job ended."""

from typing import Any

from overpaint_shared.errors import visible
from overpaint_shared.ledger.records import AttemptEnd, History
from overpaint_shared.ledger.tolerance import answers, json_object

Client = Any  # as in listing.py


def history(client: Client, job_id: str) -> History:
    """What is kept of a job's attempts; entries that cannot be read are left out."""
    with client.pipeline(transaction=False) as pipe:
        pipe.lrange(f"op:attempts:{job_id}", 0, -1)
        pipe.get(f"op:said:{job_id}")
        rows, said = answers(pipe)
    ends = [end for row in rows or () if (end := _end(row))]
    return History(tuple(ends), visible(said) if isinstance(said, str) else "")


def _end(text: str) -> AttemptEnd | None:
    try:
        row = json_object(text)
        if not row or not row.get("how"):
            return None
        return AttemptEnd(
            attempt=int(row.get("attempt") or 0),
            token=int(row.get("token") or 0),
            worker=visible(str(row.get("worker") or "")),
            started=_time(row.get("started")),
            ended=_time(row.get("ended")),
            how=visible(str(row.get("how") or "")),
            detail=visible(str(row.get("detail") or "")),
        )
    except (TypeError, ValueError, OverflowError):
        return None


def _time(value: object) -> float | None:
    return float(str(value)) if value else None
