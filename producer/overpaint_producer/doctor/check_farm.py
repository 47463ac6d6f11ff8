"""Checks of what the ledger holds: jobs, workers, queues."""

from collections.abc import Iterator, Sequence
from typing import get_args

from overpaint_producer.doctor.farm_facts import FarmFacts
from overpaint_producer.doctor.findings import Finding, Unknown, duration, ok, skipped, warn, wrong
from overpaint_shared.catalogue import Kind
from overpaint_shared.ledger import JobState, WorkerRecord

START_WORKER = "start one: overpaint-worker"


def check(facts: FarmFacts) -> Iterator[Finding]:
    """All checks of the farm."""
    yield from jobs(facts)
    yield leases(facts)
    yield quarantine(facts)
    yield from workers(facts)
    yield from queues(facts)
    yield catalogue(facts)


def jobs(facts: FarmFacts) -> Iterator[Finding]:
    """How many there are, and those that were given up."""
    if isinstance(facts.counts, Unknown):
        yield skipped("farm.jobs", facts.counts)
        return
    there = [f"{count} {state}" for state, count in facts.counts.items() if count]
    yield ok("farm.jobs", f"the ledger answers: {', '.join(there) or 'there are no jobs'}")
    if dead := facts.counts.get(JobState.DEAD, 0):
        yield warn(
            "farm.dead",
            f"jobs that were given up because engines or workers died with them: {dead}",
            "see why: overpaint dead list --all-owners; then replay or discard them",
        )


def leases(facts: FarmFacts) -> Finding:
    """A lease that ended long ago says that no worker looks after the farm."""
    if isinstance(facts.overdue_s, Unknown):
        return skipped("farm.leases", facts.overdue_s, "ask again with a worker's or the operator's settings")
    if facts.overdue_s <= 2 * facts.lease_s:
        return ok("farm.leases", "no lease is overdue")
    return wrong(
        "farm.leases",
        f"a job's lease ended {duration(facts.overdue_s)} ago and nobody took the job back: no worker looks "
        "after the ledger",
        f"{START_WORKER}; every worker takes back what others lost",
    )


def quarantine(facts: FarmFacts) -> Finding:
    """What lay in Redis and was not the farm's."""
    if isinstance(facts.quarantined, Unknown):
        return skipped("farm.quarantine", facts.quarantined, "ask again with the monitor's settings")
    if not facts.quarantined:
        return ok("farm.quarantine", "nothing was put aside")
    return warn(
        "farm.quarantine",
        f"damaged or foreign entries that were put aside: {facts.quarantined}",
        "look at them (LRANGE op:quarantine 0 -1), find who writes them, then DEL op:quarantine",
    )


def workers(facts: FarmFacts) -> Iterator[Finding]:
    """Who is alive."""
    if isinstance(facts.workers, Unknown):
        yield skipped("farm.workers", facts.workers)
        return
    if not facts.workers:
        yield wrong("farm.workers", "no worker is alive, so no job is rendered", START_WORKER)
        return
    yield ok("farm.workers", f"workers that are alive: {len(facts.workers)}")
    yield versions(facts.workers, facts.version)


def versions(alive: Sequence[WorkerRecord], mine: str) -> Finding:
    """Whether all run the version of this program."""
    others = sorted({f"{worker.name} ({worker.version})" for worker in alive if worker.version != mine})
    shown = ", ".join(others[:5]) + (", ..." if others[5:] else "")
    if not others:
        return ok("farm.versions", f"all workers have version {mine}, as this program")
    return warn(
        "farm.versions",
        f"this program has version {mine}, these workers have others: {shown}",
        "upgrade workers first, then producers",
    )


def queues(facts: FarmFacts) -> Iterator[Finding]:
    """Jobs that nobody takes."""
    if isinstance(facts.queues, Unknown) or isinstance(facts.workers, Unknown):
        return
    served = {model for worker in facts.workers for model in worker.serves}
    orphans = [queue for queue in facts.queues if queue.depth and queue.model not in served]
    for queue in orphans:
        yield wrong(
            "farm.queues",
            f"{queue.depth} jobs wait for the model {queue.model}, which no live worker serves",
            f"start a worker with --models {queue.model}",
        )
    if not orphans:
        yield ok("farm.queues", "every queue with jobs has a worker")


def catalogue(facts: FarmFacts) -> Finding:
    """One name, one set of weights."""
    if isinstance(facts.workers, Unknown):
        return skipped("farm.catalogue", facts.workers)
    merged = facts.catalogue
    differing = [
        f"{kind} {name}"
        for kind in get_args(Kind)
        for name in merged.names(kind)
        if len({traits.sha256 for _, traits in merged.find(kind, name) if traits.sha256}) > 1
    ]
    if not differing:
        return ok("farm.catalogue", "no name stands for two sets of weights")
    return wrong(
        "farm.catalogue",
        f"these names are not the same weights on all workers, so jobs that use them are refused: "
        f"{', '.join(differing)}",
        "give the weights names of their own in models.toml",
    )
