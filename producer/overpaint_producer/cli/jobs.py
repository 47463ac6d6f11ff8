"""`overpaint jobs`, `status`, `cancel` and `replay`."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from overpaint_producer.cli.context import (
    Context,
    chosen,
    emit,
    examples,
    farm_options,
    json_option,
    label,
    parsed,
    pass_context,
    say,
    table,
    tell,
)

if TYPE_CHECKING:
    from overpaint_shared.ledger import JobRecord

# Written out, since help must not import the ledger; a test holds them against it.
STATES = ("queued", "running", "cancelling", "done", "failed", "cancelled", "dead")

BATCH = 500
"""Records that are read at once."""

id_arguments = click.argument("ids", nargs=-1, metavar="ID...")
group_option = click.option("--group", metavar="NAME", help="Also all jobs of this group.")


@click.command(
    epilog=examples(
        ("overpaint jobs", "the newest hundred"),
        ("overpaint jobs --state failed --state dead --limit 5", "what went wrong lately"),
        ("overpaint jobs --group night --json | jq -r .id", "the ids of a group"),
    )
)
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES),
    help="Only jobs in this state; repeat for several.",
)
@click.option("--group", metavar="NAME", help="Only jobs of this group.")
@click.option("--model", metavar="NAME", help="Only jobs of this model.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    callback=parsed(label),
    metavar="NAME=VALUE",
    help="Only jobs with this label.",
)
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="At most so many."
)
@json_option
@farm_options
@pass_context
def jobs(
    context: Context,
    *,
    states: tuple[str, ...],
    group: str | None,
    model: str | None,
    labels: list[tuple[str, str]],
    limit: int,
    as_json: bool,
) -> None:
    """List jobs, newest first."""
    from overpaint_shared.ledger import JobState

    wanted = {JobState(state) for state in states} or None
    with context.farm() as farm:
        found = farm.jobs(state=wanted, group=group, model=model, labels=dict(labels), limit=limit)
    if as_json:
        for record in found:
            emit(record.to_json())
        return
    if not found:
        filtered = states or group is not None or model is not None or labels
        say("overpaint: no job matches" if filtered else "overpaint: there are no jobs yet")
    now = time.time()
    rows = [
        (record.id, record.state, _where(record), _age(now - record.created), record.title)
        for record in found
    ]
    table(rows, ("ID", "STATE", "STEP", "AGE", "TITLE"))


def _where(record: "JobRecord") -> str:
    if record.state not in {"running", "cancelling"} or record.stage is None:
        return ""
    return f"{record.stage} {record.step}/{record.of}" if record.of else record.stage


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


@click.command(
    epilog=examples(
        ("overpaint status 3fqk7xw2mzl5a4vn", "state, stage, times, error or files"),
        ("overpaint status 3fqk7xw2mzl5a4vn --json | jq .state", "for a script"),
    )
)
@id_arguments
@group_option
@json_option
@farm_options
@pass_context
def status(context: Context, *, ids: tuple[str, ...], group: str | None, as_json: bool) -> None:
    """Show what is known of jobs."""
    with context.farm() as farm:
        for names in batches(chosen(farm, ids, group)):
            found = farm.ledger.records(names, specs=as_json)
            for name in names:
                record = found.get(name) or farm.job(name).status()  # which raises that there is none
                if as_json:
                    emit(record.to_json())
                else:
                    _describe(record)


def batches(names: list[str]) -> Iterator[list[str]]:
    """The names, so many at a time as are read at once."""
    return (names[start : start + BATCH] for start in range(0, len(names), BATCH))


def _describe(record: "JobRecord") -> None:
    from overpaint_producer.cli.follow import describe_failure

    facts: list[tuple[object, ...]] = [(record.id, record.state), ("title", record.title)]
    if where := _where(record):
        facts.append(("at", where))
    deadline = None if record.ended else record.deadline
    times = (
        ("submitted", record.created),
        ("started", record.started),
        ("ended", record.ended),
        ("deadline", deadline),
    )
    facts += [(f"{name} (UTC)", _moment(at)) for name, at in times if at]
    if record.started:
        facts.append(("took", f"{(record.ended or time.time()) - record.started:.1f} s"))
    names = (("group", record.group), ("worker", record.worker_name))
    facts += [(name, value) for name, value in names if value]
    facts += [("label", f"{name}={value}") for name, value in record.labels.items()]
    if record.attempt > 1:
        facts.append(
            ("attempts", f"{record.attempt} ({record.crashes} crashes, {record.lost_hosts} lost workers)")
        )
    if record.error is not None:
        facts.append(("why", describe_failure(record)))
    elif record.fault is not None and record.ended is None:
        facts.append(("last fault", record.fault))  # of an attempt before
    facts += [("file", key) for key in record.files.values()]
    table(facts[1:], tuple(map(str, facts[0])))


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


@click.command(
    epilog=examples(
        ("overpaint cancel 3fqk7xw2mzl5a4vn", "`cancelled`, or `cancelling` until its worker has stopped"),
        ("overpaint cancel --group night", "a whole group"),
    )
)
@id_arguments
@group_option
@json_option
@farm_options
@pass_context
def cancel(context: Context, *, ids: tuple[str, ...], group: str | None, as_json: bool) -> None:
    """Stop jobs, waiting or running.

    A job that has ended stays as it is, and so does one whose result is committed already. Prints each job's
    state now.
    """
    with context.farm() as farm:
        names = chosen(farm, ids, group)
        states = farm.cancel(names)
        for name, state in states.items():
            if as_json:
                emit({"id": name, "state": state})
            else:
                tell(f"{name} {state}")
            if state == "running":
                say(f"overpaint: job {name} cannot be stopped any more: its result is committed")
        for name in names:
            if name not in states:
                farm.job(name)  # which raises that there is none


@click.command(
    epilog=examples(
        ("overpaint replay 3fqk7xw2mzl5a4vn", "once what made it fail is mended"),
        ("overpaint jobs --state dead --json | jq -r .id | xargs overpaint replay", "all that are dead"),
    )
)
@id_arguments
@json_option
@farm_options
@pass_context
def replay(context: Context, *, ids: tuple[str, ...], as_json: bool) -> None:
    """Queue failed or dead jobs again.

    They start anew: same spec, same seed, same id.
    """
    with context.farm() as farm:
        for name in chosen(farm, ids, None):
            job = farm.handle(name)
            job.replay()
            state = job.status().state
            if as_json:
                emit({"id": name, "state": state})
            else:
                tell(f"{name} {state}")
