"""`overpaint convert`."""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overpaint_producer.cli.context import (
    Context,
    emit,
    examples,
    farm_options,
    json_option,
    pass_context,
    say,
    tell,
)
from overpaint_producer.cli.workflows import importer, workflow_options
from overpaint_shared.errors import SpecError

if TYPE_CHECKING:
    from overpaint_producer.jobfiles import Draft
    from overpaint_producer.workflow import Conversion, WorkflowJob


@click.command(
    epilog=examples(
        ("overpaint convert workflow.json --model-map v1-5-pruned.safetensors=sd15", "prints the job"),
        (
            "overpaint convert workflow.json --farm --out jobs",
            "a file for each job, names as the workers have",
        ),
        ("overpaint convert workflow.json --json", "also which node became what"),
    )
)
@click.argument("file", metavar="FILE")
@click.option("--farm", "with_farm", is_flag=True, help="Look names up among the farm's live workers.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write a job file for each job into DIR, and print their paths.",
)
@workflow_options
@json_option
@farm_options
@pass_context
def convert(
    context: Context,
    *,
    file: str,
    with_farm: bool,
    out: Path | None,
    model_map: list[tuple[str, str]],
    input_dir: Path | None,
    as_json: bool,
) -> None:
    """Turn a ComfyUI workflow into jobs, without submitting them.

    FILE is a workflow in API format, or - for standard input. Each picture that it saves or shows becomes a
    job, which is printed: one as it is written in a file, several one a line. What a job cannot say exactly
    is refused, by node. `overpaint submit` takes workflows, too.
    """
    draft = _draft(file)
    with context.farm() if with_farm else nullcontext() as farm:
        found = importer(
            model_map, input_dir, farm.catalogue if farm is not None else lambda: None, may_guess=True
        ).convert(draft)
    if not as_json:
        for note in dict.fromkeys((*found.notes, *(note for job in found.jobs for note in job.notes))):
            say(f"overpaint: note: {note}")
    paths = _write(found, draft, out) if out is not None else {}
    if as_json:
        _emit(found, draft, paths)
    elif out is not None:
        for path in paths.values():
            tell(str(path))
    else:
        _print(found)


def _draft(file: str) -> "Draft":
    """The whole of a file, or of standard input."""
    from overpaint_producer import jobfiles

    drafts = list(jobfiles.read(file, sys.stdin.buffer))
    if len(drafts) != 1:
        raise SpecError(
            f"{file} holds {len(drafts)} JSON values; a workflow is one", fix="convert them one by one"
        )
    return drafts[0]


def _print(found: "Conversion") -> None:
    for job in found.jobs:
        indent = 2 if len(found.jobs) == 1 else None
        tell(json.dumps(job.spec, indent=indent, ensure_ascii=False))


def _emit(found: "Conversion", draft: "Draft", paths: Mapping[str, Path]) -> None:
    for job in found.jobs:
        emit(
            {
                "where": draft.where,
                "nodes": job.nodes,
                "spec": job.spec,
                "mapped": job.mapped,
                "notes": [*found.notes, *job.notes],
                "saved": paths.get(job.nodes[0]),
            }
        )


def _write(found: "Conversion", draft: "Draft", out: Path) -> dict[str, Path]:
    """A file for each job, by its first node's id; its pictures are named from there."""
    stem = "workflow" if draft.where == "standard input" else Path(draft.where).stem
    paths = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, job in enumerate(found.jobs, start=1):
            path = out / (f"{stem}-job.json" if len(found.jobs) == 1 else f"{stem}-job-{number}.json")
            path.write_text(json.dumps(_moved(job, draft.folder, out), indent=2, ensure_ascii=False) + "\n")
            paths[job.nodes[0]] = path
    except OSError as error:
        raise SpecError(f"cannot write into {out}: {error.strerror}", fix="name another folder") from error
    return paths


def _moved(job: "WorkflowJob", folder: Path, out: Path) -> dict[str, Any]:
    """The job with its pictures' paths starting from another folder."""
    from overpaint_shared.job import parse_job, reference_kind

    def moved(reference: str) -> str:
        if reference_kind(reference) != "path" or Path(reference).is_absolute():
            return reference
        return Path(os.path.relpath(folder / reference, out)).as_posix()

    names = {name: moved(name) for _, name in parse_job(job.spec).image_refs()}
    return {key: _replaced({key: part}, names)[key] for key, part in job.spec.items()}


def _replaced(value: Any, names: Mapping[str, str]) -> Any:
    """A copy with the values of all `image` keys replaced."""
    if isinstance(value, list):
        return [_replaced(part, names) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        key: names.get(part, part) if key == "image" and isinstance(part, str) else _replaced(part, names)
        for key, part in value.items()
    }
