"""`overpaint workers`, `gc` and `version`: for those who run a farm."""

import time
from datetime import timedelta
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
    table,
    tell,
)

if TYPE_CHECKING:
    from overpaint_shared.ledger import WorkerRecord

GIB = 1 << 30
KINDS = ("controlnet", "segmenter")
"""Kinds of registry entries that are shown beside the models."""


@click.command(epilog=examples(("overpaint workers --json | jq -r .models[]", "which models are served")))
@json_option
@farm_options
@pass_context
def workers(context: Context, *, as_json: bool) -> None:
    """List the live workers and what they render."""
    with context.farm() as farm:
        found = farm.workers()
    if as_json:
        for worker in found:
            emit(worker.to_json())
    elif not found:
        say("overpaint: no worker is alive; start one with: overpaint-worker")
    else:
        head = ("NAME", "DEVICE", "BUSY", "SPEED", "LOADED", "MEMORY", "UP", "MODELS")
        table([_row(worker) for worker in found], head)
        for worker in found:
            if more := _more(worker):
                tell(f"{worker.name} also has {more}")


def _more(worker: "WorkerRecord") -> str:
    """`controlnets a b; segmenters c`: what jobs may name beside a model."""
    names: dict[str, list[str]] = {}
    for entry in worker.catalogue:
        names.setdefault(str(entry.get("kind")), []).append(str(entry.get("name")))
    return "; ".join(f"{kind}s {' '.join(sorted(names[kind]))}" for kind in KINDS if kind in names)


def _row(worker: "WorkerRecord") -> tuple[object, ...]:
    from overpaint_producer.pace import speed

    device = f"{worker.device} {worker.device_name}".strip()
    memory = (
        f"{(worker.memory_used or 0) / GIB:.1f}/{worker.memory_total / GIB:.1f} GiB"
        if worker.memory_total
        else ""
    )
    minutes = f"{(time.time() - worker.started) / 60:.0f} min" if worker.started else ""
    busy = f"{worker.running}/{worker.slots}"
    loaded = " ".join(worker.warm) or worker.loaded
    return (
        worker.name,
        device,
        busy,
        speed(worker.steps_per_s, "step"),
        loaded,
        memory,
        minutes,
        " ".join(worker.models),
    )


@click.command(
    epilog=examples(
        ("overpaint gc --dry-run", "what would go, and why"),
        ("overpaint gc", "delete it; once a day is a good time"),
    )
)
@click.option("--dry-run", is_flag=True, help="Only print what would be deleted.")
@click.option(
    "--older-than",
    type=click.IntRange(24),
    default=24,
    show_default=True,
    metavar="HOURS",
    help="Spare what is younger; at least 24, for submits and attempts that are under way.",
)
@click.option("--expired-results", is_flag=True, help="Also delete results whose job record has expired.")
@json_option
@farm_options
@pass_context
def gc(context: Context, *, dry_run: bool, older_than: int, expired_results: bool, as_json: bool) -> None:
    """Delete stored files that no job needs.

    Those are attempts whose result was not committed, and uploaded pictures that no job record names,
    whoever owns them. Prints a line for each.
    """
    from overpaint_producer import garbage

    count = size = 0
    with context.farm() as farm:
        found = garbage.find(
            farm.ledger, farm.store, min_age=timedelta(hours=older_than), expired_results=expired_results
        )
        for each in found:
            if not dry_run and not garbage.delete(farm.store, each):
                continue
            count, size = count + 1, size + each.item.size
            if as_json:
                emit({"name": each.name, "bytes": each.item.size, "why": each.why, "deleted": not dry_run})
            else:
                tell(f"{each.name}  {each.item.size} bytes  ({each.why})")
    say(f"{'would delete' if dry_run else 'deleted'} {count}, {size / (1 << 20):.1f} MiB")


@click.command(epilog=examples(("overpaint version", "as in a bug report")))
@json_option
def version(as_json: bool) -> None:
    """Print the version."""
    from overpaint_shared import __version__

    if as_json:
        emit({"version": __version__})
    else:
        click.echo(f"overpaint {__version__}")
