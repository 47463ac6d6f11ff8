"""The `overpaint` command. Each command's module is imported when the command runs, so that help is quick."""

import difflib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from overpaint_producer.cli.context import Context, farm_options
from overpaint_shared.errors import EXIT_INTERRUPTED, EXIT_USAGE, MissingExtraError, OverpaintError, visible

COMMANDS = {
    "submit": (
        "overpaint_producer.cli.submit",
        "Submit jobs: files, patterns, or JSON Lines on standard input.",
    ),
    "status": ("overpaint_producer.cli.jobs", "Show what is known of jobs."),
    "watch": ("overpaint_producer.cli.follow", "Follow jobs until they end."),
    "get": ("overpaint_producer.cli.results", "Fetch the files of jobs that are done."),
    "cancel": ("overpaint_producer.cli.jobs", "Stop jobs, waiting or running."),
    "jobs": ("overpaint_producer.cli.jobs", "List jobs, newest first."),
    "replay": ("overpaint_producer.cli.jobs", "Queue failed or dead jobs again."),
    "dead": (
        "overpaint_producer.cli.dead",
        "Jobs that were given up because engines died with them: list, show, replay, discard.",
    ),
    "validate": ("overpaint_producer.cli.check", "Check job files without submitting them."),
    "convert": (
        "overpaint_producer.cli.convert",
        "Turn a ComfyUI workflow into jobs, without submitting them.",
    ),
    "schema": ("overpaint_producer.cli.check", "Print the JSON Schema of a job."),
    "workers": ("overpaint_producer.cli.operate", "List the live workers and what they render."),
    "queues": (
        "overpaint_producer.cli.watching",
        "Show each model's queue: depth, age, rate, and when it will be empty.",
    ),
    "why": ("overpaint_producer.cli.watching", "Tell why a job waits."),
    "metrics": ("overpaint_producer.cli.watching", "Serve the farm's metrics for Prometheus."),
    "doctor": ("overpaint_producer.cli.doctor", "Check a live farm: Redis, S3, jobs, workers, this machine."),
    "quota": ("overpaint_producer.cli.quota", "Show or set what an owner may have waiting and submit."),
    "audit": (
        "overpaint_producer.cli.audit",
        "Show who submitted, cancelled, replayed, discarded and fetched jobs, newest last.",
    ),
    "gc": ("overpaint_producer.cli.operate", "Delete stored files that no job needs."),
    "up": (
        "overpaint_producer.cli.up",
        "Start a whole farm on this machine: Redis, S3, a worker and Flower. Ctrl-C stops it.",
    ),
    "version": ("overpaint_producer.cli.operate", "Print the version."),
}
"""Command: (module that holds it under its own name, first line of its help)."""

WORKER_COMMANDS = {
    "render": "Render one job in this process: no Redis, no S3.",
    "prepare": "Do only what needs no diffusion model: write canvas.png and mask.png.",
    "mask": "Make only the mask: write mask.png, and heatmap.png for a mask that words find.",
    "rerender": "Render a receipt's job again, and say whether the picture is the same.",
}
"""Commands that the worker brings: they need its extra, and are shown without it, too."""

ENTRY_POINTS = "overpaint.commands"
EXTRA_MODULES = ("torch", "diffusers", "transformers")
INSTALL = "pip install 'overpaint[worker]'"

EPILOG = """\b
Examples:
  overpaint up                              a whole farm on this machine, with a demo
  overpaint submit job.json --wait --out .  submit, watch, and fetch the picture
  overpaint jobs --state failed             what went wrong lately

\b
Exit codes: 0 done, 1 a job failed, 2 the command or a job is wrong,
3 a service cannot be reached, 130 interrupted."""


class LazyGroup(click.Group):
    """A group whose commands are known by name and first line, and imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All commands in the order of their table, then the worker's."""
        return [*COMMANDS, *WORKER_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command; None for a name that is not one."""
        if cmd_name in COMMANDS:
            command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
            return command if isinstance(command, click.Command) else None
        return worker_command(cmd_name) if cmd_name in WORKER_COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Click's, but a name that is not one comes with the nearest that is."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0][:100], self.list_commands(ctx), n=1)
            if not near:
                raise
            raise click.UsageError(f"{error.message.rstrip('.')}. Did you mean {near[0]}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The table of commands, nothing imported."""
        rows = [(name, text) for name, (_, text) in COMMANDS.items()] + list(WORKER_COMMANDS.items())
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def worker_command(name: str) -> click.Command:
    """A command of the worker's, or, without its extra, one of the same name that says what to install."""
    from importlib.metadata import entry_points

    missing = [module for module in EXTRA_MODULES if importlib.util.find_spec(module) is None]
    found = [entry for entry in entry_points(group=ENTRY_POINTS) if entry.name == name]
    if missing or not found:
        return _missing_extra(name, ", ".join(missing) or "the worker")
    command = found[0].load()
    if not isinstance(command, click.Command):
        raise TypeError(f"entry point {name!r} of {ENTRY_POINTS} is no click command")
    return command


def _missing_extra(name: str, missing: str) -> click.Command:
    text = f"{WORKER_COMMANDS[name]}\n\nNot installed here ({missing} missing). To have it:\n\n\b\n{INSTALL}"

    @click.command(name, help=text, context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def stub(arguments: tuple[str, ...]) -> None:  # noqa: ARG001
        raise MissingExtraError(f"`overpaint {name}` needs {missing}, which is not installed", fix=INSTALL)

    return stub


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@farm_options
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Overpaint, a render farm for changing pictures with diffusion models."""
    ctx.ensure_object(Context)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run one command; its exit code. An unexpected error is a defect and keeps its traceback."""
    as_json = "--json" in argv
    try:
        code = cli.main(argv, prog_name="overpaint", standalone_mode=False)
    except OverpaintError as error:
        _report(error.to_json(), str(error), as_json=as_json)
        return error.exit_code
    except click.ClickException as error:
        return _report_usage(error, as_json=as_json)
    except click.Abort:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `overpaint jobs | head`: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def _report_usage(error: click.ClickException, *, as_json: bool) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    fix = None
    if isinstance(error, click.UsageError) and error.ctx is not None:
        fix = f"see {error.ctx.command_path} --help"
    message = error.format_message()
    _report(
        {"code": "usage", "message": message, "field": None, "value": None, "fix": fix},
        f"{message} ({fix})" if fix else message,
        as_json=as_json,
    )
    return EXIT_USAGE


def _report(data: dict[str, Any], text: str, *, as_json: bool) -> None:
    said = json.dumps({"error": data}, ensure_ascii=False) if as_json else f"overpaint: {text}"
    click.echo(visible(said), err=True)
