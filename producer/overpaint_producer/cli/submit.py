"""`overpaint submit`."""

import itertools
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from overpaint_producer.cli.context import (
    Context,
    emit,
    examples,
    farm_options,
    json_option,
    label,
    parsed,
    pass_context,
    say,
)
from overpaint_producer.cli.workflows import importer, workflow_options

if TYPE_CHECKING:
    from overpaint_producer.client import Farm, Job
    from overpaint_producer.jobfiles import Draft
    from overpaint_producer.submitting import Options
    from overpaint_producer.variants import Assignment
    from overpaint_producer.workflow.drafts import Importer

EXAMPLES = examples(
    ("overpaint submit job.json", "one job; prints its id"),
    ("overpaint submit jobs/*.json --wait --out pictures", "many, fetched into a folder each"),
    (
        "overpaint submit job.json --seeds 1..8 --set sampling.denoise=0.4 --set sampling.denoise=0.7",
        "sixteen jobs: every seed with every value",
    ),
    ("overpaint submit workflow.json --model-map v1-5-pruned.safetensors=sd15", "a ComfyUI workflow"),
    ("generate | overpaint submit - --token nightly --json", "JSON Lines; safe to run again"),
)


def _seeds(text: str) -> list[int]:
    from overpaint_producer.variants import parse_seeds

    return parse_seeds(text)


def _assignment(text: str) -> "Assignment":
    from overpaint_producer.variants import parse_assignment

    return parse_assignment(text)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How one file becomes many jobs."""

    assignments: Sequence["Assignment"]
    seeds: Sequence[int]
    token: str | None

    @property
    def makes_many(self) -> bool:
        """Whether a file may become more than one job."""
        paths = [path for path, _ in self.assignments]
        return len(self.seeds) > 1 or len(set(paths)) < len(paths)

    def drafts(self, draft: "Draft") -> Iterator["Draft"]:
        """The jobs of one file; several share a group, unless it names one."""
        from overpaint_producer.jobfiles import as_object
        from overpaint_producer.variants import variants

        if not self.assignments and not self.seeds:
            yield draft
            return
        group = self._group(draft) if self.makes_many else None
        for number, data in enumerate(variants(as_object(draft), self.assignments, self.seeds), start=1):
            if group is not None and data.get("group") is None:
                data["group"] = group
            where = f"{draft.where}, variant {number}" if self.makes_many else draft.where
            yield replace(draft, data=data, where=where)

    def _group(self, draft: "Draft") -> str:
        # With a token the name must be the same next time: the group is part of the job.
        return f"{Path(draft.where).stem}-{self.token or secrets.token_hex(3)}"


@click.command(epilog=EXAMPLES)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--seeds",
    multiple=True,
    callback=parsed(_seeds),
    metavar="RANGE",
    help="A job for each seed: 1..8 or 1,5,9.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    callback=parsed(_assignment),
    metavar="PATH=VALUE",
    help="Change a value of the job: sampling.steps=30. The same path again: a job for each value.",
)
@click.option("--group", metavar="NAME", help="Group of the jobs, to filter by.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    callback=parsed(label),
    metavar="NAME=VALUE",
    help="Label of the jobs, to filter by.",
)
@click.option("--priority", type=click.IntRange(0, 9), help="0 (first) to 9.")
@click.option(
    "--token",
    metavar="TOKEN",
    help="Makes this safe to repeat: a job under the same token is not made "
    "again. Of several jobs, each gets its number added: TOKEN-1, TOKEN-2, ...",
)
@click.option("--wait", is_flag=True, help="Follow the jobs until they end; exit 1 unless all are done.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="With --wait: fetch the files of jobs that are done into DIR, of several into DIR/ID.",
)
@workflow_options
@json_option
@farm_options
@pass_context
def submit(
    context: Context,
    *,
    files: tuple[str, ...],
    seeds: list[list[int]],
    assignments: list["Assignment"],
    group: str | None,
    labels: list[tuple[str, str]],
    priority: int | None,
    token: str | None,
    wait: bool,
    out: Path | None,
    model_map: list[tuple[str, str]],
    input_dir: Path | None,
    as_json: bool,
) -> int:
    """Submit jobs: files, patterns, or JSON Lines on standard input.

    FILE is a job (.json), many (.jsonl, one a line), a ComfyUI workflow in API format, or - for standard
    input. Pictures are looked for from the file's folder and uploaded once; only pictures are. Prints the id
    of each job.
    """
    from overpaint_producer.submitting import Options

    if out is not None and not wait:
        raise click.UsageError(
            "--out needs --wait; or fetch the files later with: overpaint get ID --out DIR"
        )
    sweep = Sweep(assignments=assignments, seeds=[seed for part in seeds for seed in part], token=token)
    options = Options(group=group, labels=dict(labels), priority=priority, token=token)
    with context.farm() as farm:
        workflows = importer(model_map, input_dir, farm.catalogue, may_guess=False)
        _check_files(files, sweep, options, workflows)
        drafts = _drafts(files, sweep, workflows)
        jobs = list(_submitted(farm, drafts, options, as_json=as_json, wait=wait))
        if not wait:
            return 0
        from overpaint_producer.cli.follow import follow_to_end

        return follow_to_end(farm, [job.id for job in jobs], as_json=as_json, out=out)


def _drafts(files: Sequence[str], sweep: Sweep, workflows: "Importer") -> Iterator["Draft"]:
    from overpaint_producer import jobfiles

    for name in jobfiles.expand(files):
        for read in jobfiles.read(name, sys.stdin.buffer):
            for draft in workflows.expand(read):
                yield from sweep.drafts(draft)


def _check_files(files: Sequence[str], sweep: Sweep, options: "Options", workflows: "Importer") -> None:
    """Parse everything once before anything is submitted; what comes on standard input can be read only
    once.
    """
    from overpaint_shared.job import parse_job

    for draft in _drafts([name for name in files if name != "-"], sweep, workflows):
        parse_job(options.applied(draft).data, where=draft.where)


class _Notes:
    """Tells each note once, and of a thousand different ones the first few."""

    MOST = 20

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, notes: Sequence[str]) -> None:
        """On standard error."""
        for note in notes:
            if note in self._told or len(self._told) > self.MOST:
                continue
            self._told.add(note)
            if len(self._told) > self.MOST:
                note = "there are more notes; `overpaint validate` tells all"  # noqa: PLW2901
            say(f"overpaint: note: {note}")


def _submitted(
    farm: "Farm", drafts: Iterator["Draft"], options: "Options", *, as_json: bool, wait: bool
) -> Iterator["Job"]:
    """Submit, printing each job as it is recorded: those printed are submitted, whatever comes later."""
    first = list(itertools.islice(drafts, 2))
    told = _Notes()
    for draft, job in farm.submit_drafts(itertools.chain(first, drafts), options, many=len(first) > 1):
        warnings = [str(warning) for warning in job.warnings]
        told.tell(warnings)
        if not as_json:
            click.echo(job.id)
        elif not wait:
            emit({"id": job.id, "created": job.created, "where": draft.where, "warnings": warnings})
        yield job
