"""`overpaint dead`: jobs that were given up because engines or workers died with them."""

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from overpaint_producer.cli.context import (
    Context,
    emit,
    examples,
    farm_options,
    json_option,
    label,
    parsed,
    pass_context,
    say,
    table,
)
from overpaint_shared.errors import visible

if TYPE_CHECKING:
    from overpaint_producer.client import Farm
    from overpaint_shared.ledger import History, JobRecord

EVERY = 1_000_000
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
WHY_CHARACTERS = 60


class DefaultGroup(click.Group):
    """A group whose command is `list` where none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Click's, with `list` put in front."""
        if not {*args} & {*self.commands, "-h", "--help"}:
            args.insert(0, "list")
        return super().parse_args(ctx, args)


@click.group(
    cls=DefaultGroup,
    epilog=examples(
        ("overpaint dead", "the dead jobs, newest first"),
        ("overpaint dead show 3fqk7xw2mzl5a4vn", "why it died, where, and what the engine said last"),
        ("overpaint dead replay --group night", "once what killed them is mended"),
    ),
)
@farm_options
def dead() -> None:
    """Jobs that were given up because engines died with them: list, show, replay, discard.

    Without a command it lists them: see `overpaint dead list --help`.
    """


def age(text: str) -> float:
    """Seconds: `90`, `90s`, `15m`, `2h`, `3d`. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no age; write 90s, 15m, 2h or 3d")
    return float(match[1]) * UNITS[match[2] or "s"]


def parse_age(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Seconds, as the callback of an option."""
    try:
        return None if value is None else age(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which dead jobs are meant."""

    group: str | None
    model: str | None
    labels: dict[str, str]
    older_than: float | None
    newer_than: float | None
    all_owners: bool

    @property
    def given(self) -> bool:
        """Whether any was given that chooses jobs."""
        ages = (self.older_than, self.newer_than)
        return bool(self.group or self.model or self.labels or any(each is not None for each in ages))

    def jobs(self, farm: "Farm", limit: int) -> "list[JobRecord]":
        """The dead jobs, newest first."""
        from overpaint_shared.ledger import JobState

        owner = None if self.all_owners else farm.settings.owner
        found = farm.ledger.jobs(
            owner, JobState.DEAD, group=self.group, model=self.model, labels=self.labels, limit=EVERY
        )
        now = farm.ledger.now()
        return [record for record in found if self._of_age(now - (record.ended or now))][:limit]

    def _of_age(self, seconds: float) -> bool:
        return (self.older_than is None or seconds >= self.older_than) and (
            self.newer_than is None or seconds <= self.newer_than
        )


FILTERS = (
    click.option("--group", metavar="NAME", help="Only jobs of this group."),
    click.option("--model", metavar="NAME", help="Only jobs of this model."),
    click.option(
        "--label",
        "labels",
        multiple=True,
        callback=parsed(label),
        metavar="NAME=VALUE",
        help="Only with it.",
    ),
    click.option(
        "--older-than", callback=parse_age, metavar="AGE", help="Only those that died longer ago: 2h, 3d."
    ),
    click.option(
        "--newer-than", callback=parse_age, metavar="AGE", help="Only those that died since: 15m, 2h."
    ),
    click.option("--all-owners", is_flag=True, help="Jobs of all owners, not only of --owner."),
)


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose dead jobs; they come as `filters`."""

    def gathered(*args: Any, **given: Any) -> Any:
        names = ("group", "model", "older_than", "newer_than", "all_owners")
        values = {name: given.pop(name) for name in names}
        filters = Filters(labels=dict(given.pop("labels")), **values)
        return command(*args, filters=filters, **given)

    gathered.__doc__ = command.__doc__
    gathered.__name__ = command.__name__
    gathered.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in reversed(FILTERS):
        option(gathered)
    return gathered


@dead.command(
    "list",
    epilog=examples(
        ("overpaint dead list --newer-than 1d", "those of the last day"),
        ("overpaint dead list --all-owners --json | jq -r .id", "the ids of all"),
    ),
)
@filter_options
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, metavar="N", help="At most.")
@json_option
@farm_options
@pass_context
def list_(context: Context, *, filters: Filters, limit: int, as_json: bool) -> None:
    """List the dead jobs, newest first."""
    with context.farm() as farm:
        found = filters.jobs(farm, limit)
    if as_json:
        for record in found:
            emit(record.to_json())
        return
    if not found:
        say("overpaint: no job is dead" + (" that matches" if filters.given else ""))
    now = time.time()
    rows = [
        (
            each.id,
            each.owner,
            each.model,
            _ago(now - (each.ended or now)),
            each.crashes,
            each.lost_hosts,
            _why(each),
        )
        for each in found
    ]
    table(rows, ("ID", "OWNER", "MODEL", "DIED", "CRASHES", "LOST", "WHY"))


def _ago(seconds: float) -> str:
    for unit, size in reversed(UNITS.items()):
        if seconds >= size:
            return f"{seconds / size:.0f} {'min' if unit == 'm' else unit} ago"
    return "now"


def _why(record: "JobRecord") -> str:
    text = str((record.error or {}).get("message") or record.fault or "")
    return text if len(text) <= WHY_CHARACTERS else text[: WHY_CHARACTERS - 3] + "..."


@dead.command(epilog=examples(("overpaint dead show 3fqk7xw2mzl5a4vn", "the whole story of one job")))
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@json_option
@farm_options
@pass_context
def show(context: Context, *, ids: tuple[str, ...], as_json: bool) -> None:
    """Tell why jobs died: the error, each attempt, and the last lines of the engine.

    Also of failed jobs and of those that came back from a fault.
    """
    with context.farm() as farm:
        for name in ids:
            job = farm.job(name)
            record, history = job.status(), job.history()
            if as_json:
                emit(record.to_json() | {"history": history.to_json()})
            else:
                _tell(record, history)


def _tell(record: "JobRecord", history: "History") -> None:
    from overpaint_producer.cli.follow import describe_failure

    facts: list[tuple[object, ...]] = [
        ("title", record.title),
        ("owner", record.owner),
        ("model", record.model),
    ]
    facts += [(name, value) for name, value in (("group", record.group), ("fault", record.fault)) if value]
    facts.append(("counted", f"{record.crashes} crashes, {record.lost_hosts} lost workers"))
    facts.append(("why", describe_failure(record)))
    table(facts, (record.id, str(record.state)))
    if history.attempts:
        click.echo("\nAttempts:")
        rows = [
            (
                each.attempt,
                each.how,
                each.worker,
                _moment(each.ended),
                _lasted(each.started, each.ended),
                each.detail,
            )
            for each in history.attempts
        ]
        table(rows, ("#", "END", "WORKER", "AT (UTC)", "LASTED", "WHAT"))
    if history.said:
        click.echo("\nThe engine's last lines:")
        for line in history.said.splitlines():
            click.echo(f"  {visible(line)}")


def _moment(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if seconds else ""


def _lasted(started: float | None, ended: float | None) -> str:
    return f"{ended - started:.1f} s" if started and ended else ""


def choice_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what says which jobs a command changes."""
    command = click.option("--yes", is_flag=True, help="Do not ask.")(command)
    command = click.option("--all", "every", is_flag=True, help="All dead jobs of --owner.")(command)
    command = filter_options(command)
    return click.argument("ids", nargs=-1, metavar="[ID...]")(command)


def _chosen(farm: "Farm", ids: Sequence[str], filters: Filters, *, every: bool) -> list[str]:
    """The ids that were given, else those of the dead jobs that match."""
    if ids and (every or filters.given):
        raise click.UsageError("name jobs, or choose them by options, not both")
    if ids:
        return list(dict.fromkeys(ids))
    if not every and not filters.given:
        raise click.UsageError("name jobs, or choose them: --all, --group, --label, --model, --older-than")
    return [record.id for record in filters.jobs(farm, EVERY)]


def _agreed(question: str, *, yes: bool, as_json: bool) -> None:
    """Ask, unless `yes`. Raises click.UsageError where nobody can answer, click.Abort for a no."""
    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise click.UsageError("nobody can be asked here; add --yes")
    click.confirm(question, abort=True, err=True)


def _each(names: Sequence[str], do: Callable[[str], str], *, as_json: bool) -> int:
    """Do it to each job, and tell; one that cannot be is told and does not stop the others."""
    from overpaint_shared.errors import EXIT_DONE, OverpaintError, ServiceError

    code = EXIT_DONE
    for name in names:
        try:
            now = do(name)
        except ServiceError:
            raise
        except OverpaintError as error:
            code = code or error.exit_code
            if as_json:
                emit({"id": name, "error": error.to_json()})
            else:
                say(f"overpaint: {error}")
        else:
            emit({"id": name, "state": now}) if as_json else click.echo(f"{name} {now}")
    return code


@dead.command(
    epilog=examples(
        ("overpaint dead replay 3fqk7xw2mzl5a4vn", "this job"),
        ("overpaint dead replay --group night", "a whole group, after a question"),
        ("overpaint dead replay --all --yes", "all, without"),
    )
)
@choice_options
@json_option
@farm_options
@pass_context
def replay(
    context: Context, *, ids: tuple[str, ...], filters: Filters, every: bool, yes: bool, as_json: bool
) -> int:
    """Queue dead jobs again: same spec, same seed, same id, counts reset."""
    with context.farm() as farm:
        names = _chosen(farm, ids, filters, every=every)
        if not ids and names:
            _agreed(f"Queue {len(names)} dead jobs again?", yes=yes, as_json=as_json)

        def again(name: str) -> str:
            farm.handle(name).replay()
            return "queued"

        return _each(names, again, as_json=as_json)


@dead.command(
    epilog=examples(
        ("overpaint dead discard 3fqk7xw2mzl5a4vn", "its record and what its attempts stored"),
        ("overpaint dead discard --older-than 3d --yes", "all that died long ago"),
    )
)
@choice_options
@json_option
@farm_options
@pass_context
def discard(
    context: Context, *, ids: tuple[str, ...], filters: Filters, every: bool, yes: bool, as_json: bool
) -> int:
    """Remove dead jobs for good: their records, and the files that their attempts stored."""
    with context.farm() as farm:
        names = _chosen(farm, ids, filters, every=every)
        if names:
            _agreed(f"Remove {len(names)} jobs for good?", yes=yes, as_json=as_json)

        def gone(name: str) -> str:
            farm.handle(name).discard()
            return "discarded"

        return _each(names, gone, as_json=as_json)
