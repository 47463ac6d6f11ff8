"""The commands that need the engine: `overpaint render`, `prepare`, `mask`. torch waits until they run."""

from __future__ import annotations

from pathlib import Path

import click

from overpaint_shared.errors import Problem, SpecError
from overpaint_worker.here import engine_options, prepared, read_job, render_here, write_files
from overpaint_worker.registry import SHIPPED
from overpaint_worker.terminal import bar, quiet_logs, say

_job = click.argument("job", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_out = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True,
    help="Folder to write to; made if it is not there.",
)  # fmt: skip
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of words.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress on standard error.")
registry_option = click.option(
    "--registry", type=click.Path(dir_okay=False, path_type=Path), default=SHIPPED,
    show_default="the shipped miniatures", envvar="OVERPAINT_REGISTRY", show_envvar=True,
    help="The model registry, models.toml.",
)  # fmt: skip
device_option = click.option("--device", default="cpu", show_default=True, help="cpu, or cuda:N.")
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), default=None,
    help="torch's threads within one operation. [default: the machine's cores]",
)  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  overpaint render job.json --out result
  overpaint render job.json --registry models.toml --device cuda:0 --json

\b
Exit codes: 0 rendered, 1 the job failed, 2 the command or the spec is wrong, 130 interrupted.
"""
)
@_job
@registry_option
@device_option
@threads_option
@_out
@_as_json
@quiet_option
def render(  # noqa: PLR0917 - click calls it by name
    job: Path, registry: Path, device: str, threads: int | None, out: Path, as_json: bool, quiet: bool
) -> None:
    """Render one job in this process: no Redis, no S3.

    JOB is a job spec; picture paths in it are relative to its folder. Writes image.png (or .webp, .jpeg),
    mask.png and receipt.json.
    """
    quiet_logs(as_json=as_json)
    spec, inputs = read_job(job)
    with bar(show=not quiet and not as_json) as show:
        done = render_here(spec, inputs, engine_options(registry, device, threads), show)
    paths = write_files(out, done.files)
    say(as_json, {"files": [str(path) for path in paths], **done.summary}, paths)


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
@registry_option
@device_option
@threads_option
@_out
@_as_json
def prepare(  # noqa: PLR0917 - click calls it by name
    job: Path, registry: Path, device: str, threads: int | None, out: Path, as_json: bool
) -> None:
    """Do only what needs no diffusion model: write canvas.png and mask.png.

    JOB is a job spec; picture paths in it are relative to its folder. Shows what would be rendered, and
    where. A mask that words find comes with heatmap.png.
    """
    quiet_logs(as_json=as_json)
    spec, inputs = read_job(job)
    files, about = prepared(spec, inputs, engine_options(registry, device, threads))
    paths = write_files(out, files)
    say(as_json, {"files": [str(path) for path in paths], **about}, paths)


@click.command(
    epilog="""\b
Examples:
  overpaint mask job.json --out look
  overpaint mask job.json --json

\b
Exit codes: 0 made, 1 a picture is wrong or nothing was found, 2 the command or the spec is wrong.
"""
)
@_job
@registry_option
@device_option
@threads_option
@_out
@_as_json
def mask(  # noqa: PLR0917 - click calls it by name
    job: Path, registry: Path, device: str, threads: int | None, out: Path, as_json: bool
) -> None:
    """Make only the mask: write mask.png, and heatmap.png for a mask that words find.

    JOB is a job spec; picture paths in it are relative to its folder. A mask that words find needs the
    registry's segmenter, and no diffusion model.
    """
    quiet_logs(as_json=as_json)
    spec, inputs = read_job(job)
    if spec.mask is None:
        missing = Problem(path="mask", message="is missing: the whole picture would be repainted")
        raise SpecError(f"{job} is wrong:", [missing])
    files, about = prepared(spec, inputs, engine_options(registry, device, threads))
    del files["canvas.png"]
    paths = write_files(out, files)
    say(as_json, {"files": [str(path) for path in paths], **about}, paths)
