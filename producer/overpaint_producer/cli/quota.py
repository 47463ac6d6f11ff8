"""`overpaint quota`: what an owner may have waiting and submit."""

from typing import TYPE_CHECKING, Any

import click

from overpaint_producer.cli.context import (
    Context,
    emit,
    examples,
    farm_options,
    json_option,
    pass_context,
    table,
)

if TYPE_CHECKING:
    from overpaint_shared.ledger.quotas import Quota

MOST = 10**15 - 1


class Limit(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or `default`."""

    name = "limit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number, or `default`."""
        if value == "default" or isinstance(value, int):
            return str(value) if isinstance(value, str) else value
        if not (value.isascii() and value.isdigit() and len(value) <= len(str(MOST))):
            self.fail(f"{value!r} is no limit; write a number, 0 for no limit, or default", param, ctx)
        return int(value)


@click.command(
    epilog=examples(
        ("overpaint quota ann", "what ann may have waiting, and what ann has"),
        ("overpaint quota ann --max-queued 500 --submits-per-s 20", "as the Redis user `operator`"),
        (
            "overpaint quota --everyone --max-spec-bytes 1000000",
            "for all owners that have no limit of their own",
        ),
    )
)
@click.argument("owner_name", metavar="[OWNER]", required=False)
@click.option("--everyone", is_flag=True, help="Set the limits for all owners that have none of their own.")
@click.option(
    "--max-queued", type=Limit(), metavar="N", help="Jobs that may wait. 0: no limit; default: take it back."
)
@click.option("--max-spec-bytes", type=Limit(), metavar="N", help="Bytes of the specs of all jobs that wait.")
@click.option(
    "--submits-per-s",
    type=Limit(),
    metavar="N",
    help="Submits a second; ten seconds' worth may come at once.",
)
@json_option
@farm_options
@pass_context
def quota(
    context: Context,
    *,
    owner_name: str | None,
    everyone: bool,
    max_queued: int | str | None,
    max_spec_bytes: int | str | None,
    submits_per_s: int | str | None,
    as_json: bool,
) -> None:
    """Show or set what an owner may have waiting and submit.

    Without OWNER, of this owner. Setting needs the rights of a worker or the operator, not a producer's.
    """
    given = {"max_queued": max_queued, "max_spec_bytes": max_spec_bytes, "submits_per_s": submits_per_s}
    changes = {
        name: value if isinstance(value, int) else None for name, value in given.items() if value is not None
    }
    if everyone and owner_name is not None:
        raise click.UsageError("name an owner, or --everyone")
    with context.farm() as farm:
        name = owner_name or farm.settings.owner
        if changes:
            farm.ledger.set_limits(None if everyone else name, changes)
        found = farm.ledger.quota(name)
    if as_json:
        emit({key: getattr(found, key) for key in found.__dataclass_fields__})
        return
    _show(found)


def _show(found: "Quota") -> None:
    used = {"max_queued": found.queued, "max_spec_bytes": found.spec_bytes, "submits_per_s": ""}
    rows = [
        (name, getattr(found, name) or "none", used[name], "own" if name in found.own else "everyone's")
        for name in used
    ]
    table(rows, (f"LIMIT OF {found.owner}", "IS", "USED", "WHOSE"))
