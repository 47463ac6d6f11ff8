"""`overpaint audit`: who submitted, cancelled, replayed, discarded and fetched which jobs."""

import time
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
)
from overpaint_producer.cli.dead import parse_age

if TYPE_CHECKING:
    from overpaint_shared.ledger.audit import AuditLine

ACTIONS = ("submit", "cancel", "replay", "discard", "get", "links")
HEAD = ("AT (UTC)", "ACTION", "RESULT", "OWNER", "JOBS", "CHANGED", "BY", "RIGHTS", "PROGRAM", "WHAT")


@click.command(
    epilog=examples(
        ("overpaint audit --since 1h", "the calls of the last hour, newest last"),
        ("overpaint audit --owner ann --action cancel", "who cancelled ann's jobs"),
        ("overpaint audit --limit 1000 --json | jq -r .host | sort | uniq -c", "calls for each host"),
    )
)
@click.option("--since", callback=parse_age, metavar="AGE", help="Only calls since then: 15m, 2h, 3d.")
@click.option("--action", type=click.Choice(ACTIONS), help="Only these calls.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="At most.")
@json_option
@farm_options
@pass_context
def audit(context: Context, *, since: float | None, action: str | None, limit: int, as_json: bool) -> None:
    """Show who submitted, cancelled, replayed, discarded and fetched jobs, newest last.

    A line for each call, of however many jobs, refused calls too. Without --owner, of all owners' jobs. Needs
    the Redis user `operator` (or a worker's).
    """
    with context.farm() as farm:
        start = None if since is None else farm.ledger.now() - since
        found = farm.ledger.audit(since=start, owner=context.options.get("owner"), action=action, limit=limit)
    if found.unreadable:
        say(f"overpaint: {found.unreadable} entries of the audit trail cannot be read")
    if as_json:
        for line in found.lines:
            emit(line.to_json())
        return
    if not found.lines:
        say("overpaint: the audit trail has no such call")
    table([row(line) for line in found.lines], HEAD)


def row(line: "AuditLine") -> tuple[object, ...]:
    """The cells of a line."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line.at))
    by = f"{line.os_user}@{line.host}" if line.os_user or line.host else ""
    return (
        at,
        line.action,
        line.result,
        line.owner,
        line.jobs,
        line.changed,
        by,
        line.rights,
        line.program,
        what(line),
    )


def what(line: "AuditLine") -> str:
    """The jobs, their group, and the name of the picture."""
    ids = " ".join(line.ids) + (" ..." if line.jobs > len(line.ids) else "")
    named = [f"{word} {value}" for word, value in (("group", line.group), ("name", line.name)) if value]
    return ", ".join(filter(None, [ids, *named]))
