"""`overpaint doctor`: whether a live farm is sound."""

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
)
from overpaint_shared.errors import EXIT_DONE, EXIT_JOB_FAILED, EXIT_SERVICE, visible

if TYPE_CHECKING:
    from overpaint_producer.doctor import Examination, Finding

WORDS = {"ok": "OK", "warn": "WARN", "wrong": "WRONG", "skipped": "SKIPPED"}


@click.command(
    epilog=examples(
        ("overpaint doctor", "what is wrong with the farm, and what to do"),
        ("overpaint doctor --json | jq 'select(.level == \"wrong\")'", "for a script"),
    )
)
@click.option(
    "--timeout",
    type=click.FloatRange(1, 600),
    default=15.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up on what has not answered by then.",
)
@click.option("--quiet", is_flag=True, help="Leave out what is OK or was not looked at.")
@json_option
@farm_options
@pass_context
def doctor(context: Context, *, timeout: float, quiet: bool, as_json: bool) -> int:
    """Check a live farm: Redis, S3, jobs, workers, this machine.

    Looks as far as the rights of its settings go; the operator's see most. Writes one small object into the
    bucket and deletes it. Exit code 1 if anything is WRONG, 3 if neither Redis nor S3 answers.
    """
    from overpaint_producer.doctor import examine

    found = examine(context.settings(), timeout)
    for finding in found.findings:
        if not (quiet and finding.level in {"ok", "skipped"}):
            _tell(finding, as_json=as_json)
    if not as_json:
        _sum_up(found)
    if not found.reached:
        return EXIT_SERVICE
    return EXIT_DONE if found.healthy else EXIT_JOB_FAILED


def _tell(finding: "Finding", *, as_json: bool) -> None:
    if as_json:
        emit(finding.to_json())
        return
    click.echo(visible(f"{WORDS[finding.level]:8}{finding.check:24}{finding.text}"))
    if finding.fix and finding.level != "skipped":
        click.echo(visible(f"{'':32}-> {finding.fix}"))


def _sum_up(found: "Examination") -> None:
    counts = {level: sum(each.level == level for each in found.findings) for level in WORDS}
    say("overpaint: " + ", ".join(f"{counts[level]} {word}" for level, word in WORDS.items()))
