"""`overpaint watch`, and the waiting of `overpaint submit --wait`."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from overpaint_producer.cli.context import (
    Context,
    chosen,
    emit,
    examples,
    farm_options,
    json_option,
    pass_context,
    say,
)
from overpaint_shared.errors import EXIT_DONE, EXIT_JOB_FAILED

if TYPE_CHECKING:
    from overpaint_producer.client import Farm
    from overpaint_shared.ledger import JobRecord

MOST_NAMED = 3

EXAMPLES = examples(
    ("overpaint watch 3fqk7xw2mzl5a4vn", "until it ends; exit 1 unless it is done"),
    ("overpaint watch --group night --json", "every event of a group's jobs, one a line"),
)


@click.command(epilog=EXAMPLES)
@click.argument("ids", nargs=-1, metavar="ID...")
@click.option("--group", metavar="NAME", help="Also all jobs of this group.")
@json_option
@farm_options
@pass_context
def watch(context: Context, *, ids: tuple[str, ...], group: str | None, as_json: bool) -> int:
    """Follow jobs until they end.

    Bars on a terminal, plain lines elsewhere, on standard error; with --json every event on standard output.
    Interrupting it (Ctrl-C) stops the watching, not the jobs.
    """
    with context.farm() as farm:
        names = chosen(farm, ids, group)
        if as_json:
            return _events(farm, names)
        return follow_to_end(farm, names, as_json=False, out=None)


def _events(farm: "Farm", ids: Sequence[str]) -> int:
    states = {}
    for event in farm.follow(ids):
        states[event.job_id] = event.state
        emit(asdict(event))
    return EXIT_DONE if set(states.values()) <= {"done"} else EXIT_JOB_FAILED


def follow_to_end(farm: "Farm", ids: Sequence[str], *, as_json: bool, out: Path | None) -> int:
    """Show progress until all jobs have ended, then how; with `out`, fetch the files of those that are
    done.
    """
    from overpaint_producer.progress import display

    try:
        with display(ids, partial(_title, farm)) as shown:
            for event in farm.follow(ids):
                shown.show(event)
    except KeyboardInterrupt:
        say(f"overpaint: the jobs go on; watch them again with: overpaint watch {_named(farm, ids)}")
        raise
    found = farm.ledger.records(ids)
    records = [found[job_id] for job_id in ids if job_id in found]
    for record in records:
        _ended(farm, record, as_json=as_json, out=_folder(out, record.id, many=len(ids) > 1))
    all_done = len(records) == len(ids) and all(record.state == "done" for record in records)
    return EXIT_DONE if all_done else EXIT_JOB_FAILED


def _title(farm: "Farm", job_id: str) -> str | None:
    """Id and title for a bar. Read when it is needed: of thousands of jobs, few run at a time."""
    record = farm.ledger.records([job_id]).get(job_id)
    return f"{job_id} {record.title}" if record is not None else None


def _named(farm: "Farm", ids: Sequence[str]) -> str:
    """What to type after `watch`: the ids, or for many their group if they have one."""
    if len(ids) > MOST_NAMED:
        record = farm.ledger.job(ids[0])
        if record is not None and record.group is not None:
            return f"--group {record.group}"
    return " ".join(ids)


def _folder(out: Path | None, job_id: str, *, many: bool) -> Path | None:
    return out / job_id if out is not None and many else out


def _ended(farm: "Farm", record: "JobRecord", *, as_json: bool, out: Path | None) -> None:
    saved = []
    if record.state == "done" and out is not None:
        saved = [str(path) for path in farm.job(record.id).save(out)]
    if as_json:
        emit(record.to_json() | {"saved": saved})
        return
    if record.state != "done":
        say(f"overpaint: job {record.id} {describe_failure(record)}")
    for path in saved:
        say(f"saved {path}")


def describe_failure(record: "JobRecord") -> str:
    """How a job ended that is not done, in a line: `failed: mask.image: ...`."""
    from overpaint_shared.errors import OverpaintError

    if record.error is not None:
        return f"{record.state}: {OverpaintError.from_json(record.error)}"
    # A job that somebody cancelled may have had a fault before, which did not end it.
    told = record.fault and record.state != "cancelled"
    return f"{record.state}: {record.fault}" if told else str(record.state)
