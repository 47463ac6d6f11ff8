"""What the worker's commands show on a terminal: progress and results."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from overpaint_shared.errors import visible
from overpaint_worker import protocol as p


class Show:
    """Takes a job's progress to the terminal; does nothing if nobody looks."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task: TaskID | None = progress.add_task("prepare", total=None) if progress else None

    def __call__(self, message: p.Progress) -> None:
        """One more step."""
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task, description=message.stage, completed=message.step, total=message.of
            )


@contextmanager
def bar(*, show: bool) -> Iterator[Show]:
    """A progress bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield Show(None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Show(progress)


def say(as_json: bool, about: Mapping[str, Any], paths: list[Path]) -> None:
    """One JSON object, or the paths, one a line."""
    if as_json:
        click.echo(json.dumps(about))
        return
    for path in paths:
        click.echo(visible(str(path)))


def quiet_logs(*, as_json: bool) -> None:
    """Log defects alone: what is expected is raised, and said by the command line in words or as JSON."""
    from overpaint_worker.logs import configure

    configure(as_json=as_json)
    logging.getLogger().setLevel(logging.ERROR)
