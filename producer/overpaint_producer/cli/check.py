"""`overpaint validate` and `overpaint schema`."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

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
from overpaint_shared.errors import EXIT_DONE, InputError, SpecError

if TYPE_CHECKING:
    from overpaint_producer.jobfiles import Draft
    from overpaint_producer.workflow.drafts import Importer
    from overpaint_shared.catalogue import SpecWarning
    from overpaint_shared.job import JobSpec
    from overpaint_shared.setting_views import Limits


@click.command(
    epilog=examples(
        ("overpaint validate jobs/*.json", "the files alone; needs no farm"),
        ("overpaint validate job.json --farm", "also whether a live worker can render it"),
    )
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--farm", "with_farm", is_flag=True, help="Also check names and features against the farm's live workers."
)
@workflow_options
@json_option
@farm_options
@pass_context
def validate(
    context: Context,
    *,
    files: tuple[str, ...],
    with_farm: bool,
    model_map: list[tuple[str, str]],
    input_dir: Path | None,
    as_json: bool,
) -> int:
    """Check job files without submitting them.

    FILE is as for submit. Checks the spec and the operator's limits, and tells known mistakes; of the
    pictures only the headers are read. Exit 2 if any job is wrong, 1 if only a picture cannot be used; all
    problems of all files are told.
    """
    code = EXIT_DONE
    with context.farm() if with_farm else nullcontext() as farm:
        catalogue = farm.catalogue() if farm is not None else None
        check = _checker(context, catalogue)
        workflows = importer(model_map, input_dir, lambda: catalogue, may_guess=True)
        for outcome in _drafts(files, workflows):
            code = max(code, _tell(outcome, check, as_json=as_json))
    return code


Check = Callable[["Draft"], "tuple[SpecWarning, ...]"]


def _checker(context: Context, catalogue: object) -> Check:
    from overpaint_producer.headers import sizes_of
    from overpaint_producer.pictures import check_sizes
    from overpaint_shared.catalogue import Catalogue, check
    from overpaint_shared.job import parse_job
    from overpaint_shared.lint import lint

    limits = context.settings().limits()

    def checked(draft: "Draft") -> "tuple[SpecWarning, ...]":
        spec = parse_job(draft.data, where=draft.where)
        asked = catalogue if isinstance(catalogue, Catalogue) else Catalogue()
        warnings = check(spec, asked, limits, where=draft.where)
        if asked is not catalogue:
            warnings = ()  # the only one is that no worker was asked
        sizes, defaults = sizes_of(spec, draft.folder), asked.defaults(spec.model)
        check_sizes(spec, sizes, draft.where)
        _check_unread(spec, draft.folder, sizes, limits)
        return (*warnings, *lint(spec, defaults=defaults, source_size=sizes.get(spec.source.image)))

    return checked


def _check_unread(
    spec: "JobSpec", folder: Path, sizes: Mapping[str, tuple[int, int]], limits: "Limits"
) -> None:
    """Refuse the pictures that `submit` refuses, in its words; those of `sizes` are known to be pictures."""
    from overpaint_producer.pictures import read_picture
    from overpaint_shared.job import reference_kind

    errors = []
    for field, reference in spec.image_refs():
        if reference_kind(reference) == "path" and reference not in sizes:
            try:
                read_picture(folder / reference, limits, field)
            except InputError as error:
                errors.append(error)
    if errors:
        first, others = errors[0], "".join(f"; {error}" for error in errors[1:])
        raise InputError(first.message + others, field=first.field, value=first.value, fix=first.fix)


def _drafts(files: Sequence[str], workflows: "Importer") -> Iterator["Draft | SpecError"]:
    """Every draft; a file that cannot be read is told in its place, and the next one is read."""
    from overpaint_producer import jobfiles

    for name in files:
        try:
            for path in jobfiles.expand([name]):
                for draft in jobfiles.read(path, sys.stdin.buffer):
                    yield from workflows.expand(draft)
        except SpecError as error:
            yield error


def _tell(outcome: "Draft | SpecError", check: Check, *, as_json: bool) -> int:
    """Print what a check says; the exit code that it asks for."""
    error: SpecError | InputError | None = None
    warnings: tuple[SpecWarning, ...] = ()
    where = ""
    if isinstance(outcome, SpecError):
        error = outcome
    else:
        where = outcome.where
        try:
            warnings = check(outcome)
        except (SpecError, InputError) as problem:
            error = problem
    if as_json:
        told = [str(warning) for warning in warnings]
        emit(
            {
                "where": where,
                "ok": error is None,
                "warnings": told,
                "error": error.to_json() if error else None,
            }
        )
    elif error is not None:
        file = f"{where}: " if isinstance(error, InputError) else ""  # the others name it themselves
        say(f"overpaint: {file}{error}")
    else:
        tell(f"{where}: ok")
        for warning in warnings:
            say(f"overpaint: note: {warning}")
    return error.exit_code if error else EXIT_DONE


@click.command(
    epilog=examples(("overpaint schema > job.schema.json", "for an editor that completes and checks"))
)
@click.option("--json", "as_json", is_flag=True, help="On one line.")
def schema(as_json: bool) -> None:
    """Print the JSON Schema of a job."""
    from overpaint_shared import job

    if as_json:
        emit(job.schema())
    else:
        click.echo(json.dumps(job.schema(), indent=2, ensure_ascii=False))
