"""The commands that need the engine: `overpaint render`, `overpaint prepare`. torch waits until they run."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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

from overpaint_shared.errors import (
    EXIT_INTERRUPTED,
    InputError,
    MissingExtraError,
    OverpaintError,
    SettingsError,
    UnsupportedError,
)
from overpaint_shared.job import JobSpec, parse_job
from overpaint_shared.settings import Limits
from overpaint_worker import protocol as p

if TYPE_CHECKING:
    from overpaint_worker.engine.conductor import Conductor

HERE: Final = "here"
"""The job's name where there is no farm to give it one."""

_job = click.argument("job", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_out = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True,
    help="Folder to write to; made if it is not there.",
)  # fmt: skip
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of words.")
_quiet = click.option("--quiet", is_flag=True, help="No progress on standard error.")


@click.command(
    epilog="""\b
Examples:
  overpaint render job.json --registry models.toml --out result
  overpaint render job.json --registry models.toml --device cuda:0 --json

\b
Exit codes: 0 rendered, 1 the job failed, 2 the command or the spec is wrong, 130 interrupted.
"""
)
@_job
@click.option(
    "--registry", type=click.Path(dir_okay=False, path_type=Path), required=True,
    envvar="OVERPAINT_REGISTRY", show_envvar=True, help="The model registry, models.toml.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda:N.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=None,
    help="torch's threads within one operation. [default: the machine's cores]",
)  # fmt: skip
@_out
@_as_json
@_quiet
def render(  # noqa: PLR0917 - click calls it by name
    job: Path, registry: Path, device: str, threads: int | None, out: Path, as_json: bool, quiet: bool
) -> None:
    """Render one job in this process: no Redis, no S3.

    JOB is a job spec; picture paths in it are relative to its folder. Writes image.png (or .webp, .jpeg),
    mask.png and receipt.json.
    """
    with _words_for_errors(as_json=as_json):
        spec, inputs = read_job(job)
        _need_engine()
        from overpaint_worker.engine.options import EngineOptions

        options = EngineOptions(
            fd=-1,
            registry=registry,
            device=device,
            threads=threads or _cores(),
            hashes=_hashes(),
            limits=Limits(),
        )
        with _bar(show=not quiet and not as_json) as show:
            done = _render_here(spec, inputs, options, show)
        paths = write_files(out, done.files)
        _say(as_json, {"files": [str(path) for path in paths], **done.summary}, paths)


@click.command(
    epilog="""\b
Examples:
  overpaint prepare job.json --out look
  overpaint prepare job.json --json

\b
Exit codes: 0 prepared, 1 a picture or mask is wrong, 2 the command or the spec is wrong.
"""
)
@_job
@_out
@_as_json
def prepare(job: Path, out: Path, as_json: bool) -> None:
    """Do only what needs no diffusion model: write canvas.png and mask.png.

    JOB is a job spec; picture paths in it are relative to its folder. Shows what would be rendered, and
    where.
    """
    with _words_for_errors(as_json=as_json):
        spec, inputs = read_job(job)
        _need_engine()
        files, about = _prepared(spec, inputs)
        paths = write_files(out, files)
        _say(as_json, {"files": [str(path) for path in paths], **about}, paths)


def read_job(path: Path) -> tuple[JobSpec, dict[str, bytes]]:
    """A spec from a file, and the pictures it names, read from beside it.

    Raises:
        SpecError: the spec is wrong. InputError: a picture cannot be read. UnsupportedError: a picture is not
        a file.

    """
    spec = parse_job(path.read_bytes(), where=str(path))
    inputs: dict[str, bytes] = {}
    for field, reference in spec.image_refs():
        if reference.startswith(("s3://", "sha256:")):
            raise UnsupportedError(
                "this command reads pictures from files only", field=field, value=reference,
                fix="name a file, or submit the job to a farm",
            )  # fmt: skip
        try:
            inputs[reference] = (path.parent / reference).read_bytes()
        except OSError as error:
            raise InputError(
                f"the picture cannot be read: {error.strerror}", field=field, value=reference,
                fix=f"paths are relative to {path.parent}",
            ) from error  # fmt: skip
    return spec, inputs


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write a result's files. Raises `SettingsError` if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise SettingsError(
            f"cannot write: {error.strerror}", field="--out", value=str(folder), fix="choose another folder"
        ) from error
    return [folder / name for name in files]


def _render_here(spec: JobSpec, inputs: Mapping[str, bytes], options: Any, show: Show) -> p.Done:
    from overpaint_worker.engine.assemble import build

    ends: list[p.Done | p.Failed | p.Cancelled] = []

    def heard(message: p.ToWorker) -> None:
        if isinstance(message, p.Progress):
            show(message)
        elif isinstance(message, p.Done | p.Failed | p.Cancelled):
            ends.append(message)

    conductor = build(options, heard)
    conductor.submit(p.Render(job=HERE, token=0, spec_json=spec.to_json(), inputs=inputs))
    _until_done(conductor)
    end = ends[0]
    if isinstance(end, p.Done):
        return end
    raise OverpaintError.from_json(end.error) if isinstance(end, p.Failed) else KeyboardInterrupt


def _until_done(conductor: Conductor) -> None:
    try:
        conductor.run_until_idle()
    finally:
        conductor.close()


def _prepared(spec: JobSpec, inputs: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, Any]]:
    from overpaint_shared.job import Output
    from overpaint_worker.engine import encode, masks
    from overpaint_worker.engine.packing import mask_png
    from overpaint_worker.engine.preparation import open_pictures

    source, canvas, mask = open_pictures(spec, inputs, Limits())
    files = {"canvas.png": encode.encode(canvas.rgb, Output(), canvas.icc, canvas.alpha, depth=canvas.depth)}
    about: dict[str, Any] = {
        "width": canvas.size.width,
        "height": canvas.size.height,
        "notes": list(source.notes),
    }
    if mask is not None:
        files["mask.png"] = mask_png(mask)
        about["mask_coverage"] = round(masks.coverage(mask), 6)
    return files, about


def _need_engine() -> None:
    from importlib.util import find_spec

    for module in ("torch", "diffusers", "transformers"):
        if find_spec(module) is None:
            raise MissingExtraError(
                f"this command needs {module}, which is not installed", fix="pip install 'overpaint[worker]'"
            )


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hashes() -> Path:
    import os

    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "overpaint" / "hashes.json"


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
def _bar(*, show: bool) -> Iterator[Show]:
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


def _say(as_json: bool, about: Mapping[str, Any], paths: list[Path]) -> None:
    if as_json:
        click.echo(json.dumps(about))
        return
    for path in paths:
        click.echo(path)


@contextmanager
def _words_for_errors(*, as_json: bool) -> Iterator[None]:
    """Expected failures in words and with their exit code; surprises keep their traceback."""
    from overpaint_worker.logs import configure

    configure(as_json=as_json)
    logging.getLogger().setLevel(logging.ERROR)  # what is expected is said in words below
    try:
        yield
    except OverpaintError as error:
        if as_json:
            click.echo(json.dumps({"error": error.to_json()}))
        click.echo(f"overpaint: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("overpaint: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
