"""What those who watch a farm ask: how many jobs of each kind, how long the queues are, where a job stands.

All of it is read from counters and the sizes of sorted sets, never from the records one by one, so that it
costs the same with ten jobs and with a million.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

from overpaint_shared.ledger import wire
from overpaint_shared.ledger.listing import clock
from overpaint_shared.ledger.records import Count, JobRecord, Place, QueueState
from overpaint_shared.ledger.scripts import PACE_SLICE_S, PACE_SLICES
from overpaint_shared.ledger.states import LEASED, JobState
from overpaint_shared.ledger.tolerance import answers, number, tolerated

Client = Any  # as in listing.py


def now(client: Client) -> list[Count]:
    """How many records there are of each state, model and method; kinds without one are left out."""
    return _counts(tolerated(client.hgetall, "op:census") or {})


def ever(client: Client) -> list[Count]:
    """How many jobs ever came into each state, by model and method."""
    return _counts(tolerated(client.hgetall, "op:moves") or {})


def _counts(fields: Mapping[str, str]) -> list[Count]:
    counts = (_count(name, jobs) for name, jobs in sorted(fields.items()))
    return [count for count in counts if count is not None and count.jobs > 0]


def _count(name: str, jobs: str) -> Count | None:
    """One field of a census; None for what is none, which the reaper puts aside."""
    try:
        state, model, method = name.split("|")
        return Count(JobState(state), model, method, int(jobs))
    except ValueError:
        return None


def quarantined(client: Client) -> int:
    """How many items of the queues were no messages (the newest hundred are kept)."""
    return int(tolerated(client.llen, "op:quarantine") or 0)


def queues(client: Client, served: Collection[str]) -> list[QueueState]:
    """The queues of all models that are `served`, or have jobs that wait or run, by name."""
    counts = now(client)
    running, waiting = Counter[str](), set[str]()
    for count in counts:
        if count.state in LEASED:
            running[count.model] += count.jobs
        elif count.state is JobState.QUEUED:
            waiting.add(count.model)
    models = sorted({*served, *running, *waiting})
    at, rates = clock(client), _rates(client)
    with client.pipeline(transaction=False) as pipe:
        for model in models:
            pipe.zcard(f"op:queued:{model}")
            pipe.zrange(f"op:queued:{model}", 0, 0, withscores=True)
        rows = answers(pipe)
    return [
        QueueState(
            model,
            depth or 0,
            max(0.0, at - oldest[0][1]) if oldest else None,
            running[model],
            rates.get(model),
        )
        for model, depth, oldest in zip(models, rows[::2], rows[1::2], strict=True)
    ]


def _rates(client: Client) -> dict[str, float]:
    at = clock(client)
    newest = int(at // PACE_SLICE_S)
    with client.pipeline(transaction=False) as pipe:
        for piece in range(newest - PACE_SLICES + 1, newest + 1):
            pipe.hgetall(f"op:pace:{piece}")
        pipe.hgetall("op:pace:since")
        *slices, busy = answers(pipe)
    running = {
        model: max(0.0, at - began) for model, since in (busy or {}).items() if (began := number(since))
    }
    return rates([row for row in slices if row], running)


def rates(slices: Iterable[Mapping[str, str]], running_s: Mapping[str, float]) -> dict[str, float]:
    """Jobs of each model that ended, per second in which any of them ran.

    Pauses do not count, so a farm that was idle is as fast as it was before. `slices`: what `op:pace:<slice>`
    holds. `running_s`: seconds since a model's jobs, which still run, were last told there.
    """
    ended, seconds = Counter[str](), dict(running_s)
    for field, value in chain.from_iterable(row.items() for row in slices):
        model, bar, _ = field.partition("|")
        if bar:
            seconds[model] = seconds.get(model, 0.0) + (number(value) or 0) / 1e6
        else:
            ended[model] += int(number(value) or 0)
    return {model: jobs / seconds[model] for model, jobs in ended.items() if seconds.get(model)}


def place(client: Client, record: JobRecord) -> Place | None:
    """Where a queued job stands; None if it does not wait (any more)."""
    names = (wire.lane(lane) for lane in tolerated(client.zrange, "op:lanes", 0, -1) or ())
    lanes = [lane for lane in names if lane is not None and lane.model == record.model]
    own = wire.Lane(record.priority_class, record.model, record.owner)
    with client.pipeline(transaction=False) as pipe:  # a full Redis 6.2 refuses even reads in MULTI
        pipe.zscore(f"op:queued:{record.model}", record.id)
        pipe.zscore(f"op:sent:{own}", record.id)
        pipe.zrank(f"op:wait:{own}", record.id)
        queued, sent, rank = answers(pipe)
    if queued is None or (sent is None and rank is None):
        return None
    better = [lane for lane in lanes if lane.priority_class < own.priority_class]
    equal = [lane for lane in lanes if lane.priority_class == own.priority_class]
    before = "+inf" if sent is None else f"({sent!r}"  # without a message: after all that have one
    with client.pipeline(transaction=False) as pipe:
        for lane in better:
            pipe.zcard(f"op:sent:{lane}")
            pipe.zcard(f"op:wait:{lane}")
        for lane in equal:
            pipe.zcount(f"op:sent:{lane}", "-inf", before)
        ahead = _sum(answers(pipe))
    return Place(ahead + int(rank or 0), sent is not None, max(0.0, clock(client) - float(queued)))


def _sum(numbers: Iterable[Any]) -> int:
    return sum(int(number or 0) for number in numbers)
