"""What the commands that take ComfyUI workflows share: their options, and who turns workflows into jobs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overpaint_producer.cli.context import parsed, say

if TYPE_CHECKING:
    from overpaint_producer.workflow.drafts import Importer
    from overpaint_shared.catalogue import Catalogue

Command = TypeVar("Command", bound=Callable[..., Any])


def _mapping(text: str) -> tuple[str, str]:
    from overpaint_producer.workflow.names import parse_mapping

    return parse_mapping(text)


def workflow_options(command: Command) -> Command:
    """Add the options that say what the files are that a workflow names."""
    command = click.option(
        "--input-dir",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        help="Of a ComfyUI workflow: the folder of the pictures that it loads; else the workflow's own.",
    )(command)
    return click.option(
        "--model-map",
        multiple=True,
        callback=parsed(_mapping),
        metavar="FILE=NAME",
        help="Of a ComfyUI workflow: the registry's name for a file that it loads.",
    )(command)


def importer(
    model_map: list[tuple[str, str]],
    input_dir: Path | None,
    catalogue: "Callable[[], Catalogue | None]",
    *,
    may_guess: bool,
) -> "Importer":
    """Turns workflows into drafts, and tells their notes on standard error."""
    from overpaint_producer.workflow.drafts import Importer

    return Importer(
        mapped=dict(model_map),
        input_dir=input_dir,
        catalogue=catalogue,
        tell=lambda note: say(f"overpaint: note: {note}"),
        may_guess=may_guess,
    )
