"""What all commands share: where the farm is, how to print, how to fail."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overpaint_shared.errors import visible

if TYPE_CHECKING:
    from overpaint_producer.client import Farm
    from overpaint_shared.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])
Value = TypeVar("Value")

FARM_OPTIONS = (
    ("config", "FILE", "Configuration file (TOML)."),
    ("redis_url", "URL", "Redis, where job records and queues live."),
    ("s3_endpoint_url", "URL", "The S3 server, where pictures live."),
    ("s3_bucket", "NAME", "Bucket of inputs and results."),
    ("owner", "NAME", "Whose jobs these are."),
)


@dataclass
class Context:
    """The options that say where the farm is, as they were given. `ctx.obj` of every command."""

    options: dict[str, str] = field(default_factory=dict)
    _notes_told: bool = field(default=False, init=False)

    def settings(self) -> "Settings":
        """The settings: these options, then the environment, then the file. Raises SettingsError.

        Once in a command it tells of variables that are almost a setting.
        """
        from pathlib import Path

        from overpaint_shared.misspelt import misspelt
        from overpaint_shared.settings import Settings

        if not self._notes_told:
            self._notes_told = True
            for note in misspelt():
                say(f"overpaint: note: {note}")
        given = dict(self.options)
        config = given.pop("config", None)
        return Settings.load(Path(config) if config else None, **given)

    @contextmanager
    def farm(self) -> Iterator["Farm"]:
        """The farm, connected."""
        with _connected(self.settings()) as farm:
            farm.on_wait = lambda text: say(f"overpaint: {text}")
            yield farm


def _connected(settings: "Settings") -> "Farm":
    """The farm; where nobody said where it is, and this folder had one, that it has stopped."""
    from pathlib import Path

    from overpaint_producer.client import Farm
    from overpaint_shared.errors import LedgerUnreachable

    try:
        return Farm.connect(settings)
    except LedgerUnreachable as error:
        if settings.source("redis_url") is not None or not Path("overpaint-data").is_dir():
            raise
        raise LedgerUnreachable(
            "the farm of this folder is not running", field=error.field, value=error.value,
            fix="start it with ./up, or with overpaint up",
        ) from error  # fmt: skip


class FarmOption(click.Option):
    """An option that stands for a setting. Help names its variable; the settings read it, not click, so that
    a message about a wrong value can say where that value stands.
    """

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:  # noqa: ARG002
        """Nothing: see the class."""
        return None


def farm_options(command: Command) -> Command:
    """Add the options that say where the farm is. They may stand before or after a command's name."""
    for name, metavar, text in reversed(FARM_OPTIONS):
        command = click.option(
            f"--{name.replace('_', '-')}",
            cls=FarmOption,
            metavar=metavar,
            help=text,
            envvar=f"OVERPAINT_{name.upper()}",
            show_envvar=True,
            expose_value=False,
            callback=_keep,
        )(command)
    return command


def _keep(ctx: click.Context, option: click.Parameter, value: str | None) -> None:
    if value is not None and option.name is not None:
        ctx.ensure_object(Context).options[option.name] = value


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, one object per line; errors too."
)
pass_context = click.make_pass_decorator(Context, ensure=True)


def parsed(
    parse: Callable[[str], Value],
) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], list[Value]]:
    """The callback of an option that may be repeated; `parse` raises ValueError for what it cannot read."""

    def callback(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[Value]:
        try:
            return [parse(value) for value in values]
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return callback


def label(text: str) -> tuple[str, str]:
    """The two sides of `name=value`. Raises ValueError."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"{text!r} is no label; write name=value")
    return name, value


def emit(value: Any) -> None:
    """One line of JSON on standard output; what would move a terminal's cursor stands as its escape."""
    click.echo(visible(json.dumps(value, ensure_ascii=False, default=str)))


def say(message: str) -> None:
    """A message for people, on standard error; what would move their cursor stands as its escape."""
    click.echo(visible(message), err=True)


def tell(message: str) -> None:
    """A line of the answer, on standard output, made safe alike: stages, names and causes are strangers'."""
    click.echo(visible(message))


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> None:
    """Aligned columns on standard output, without a head where there is no row."""
    if not rows:
        return
    cells = [list(head), *([_plain(value) for value in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    for row in cells:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def _plain(value: object) -> str:
    """Text without what could move the cursor: titles and labels come from job files."""
    return "".join(sign if sign.isprintable() else "?" for sign in ("" if value is None else str(value)))


def examples(*lines: tuple[str, str]) -> str:
    """The end of a command's help: (what to type, what it does)."""
    shown = "\n".join(f"  {line}\n      {does}" for line, does in lines)
    return f"\b\nExamples:\n{shown}"


def chosen(farm: "Farm", ids: Sequence[str], group: str | None) -> list[str]:
    """The ids that were given, and those of a group. Raises click.UsageError for none at all."""
    if not ids and group is None:
        raise click.UsageError("name a job, or --group")
    found = farm.group(group) if group is not None else []
    if group is not None and not found:
        raise click.UsageError(f"no job has the group {group!r}")
    return list(dict.fromkeys([*ids, *found]))
