"""`overpaint get`."""

from pathlib import Path

import click

from overpaint_producer.cli.context import (
    Context,
    chosen,
    emit,
    examples,
    farm_options,
    json_option,
    pass_context,
    tell,
)

EXAMPLES = examples(
    ("overpaint get 3fqk7xw2mzl5a4vn --out pictures", "the picture, its receipt and previews"),
    ("overpaint get --group night --out pictures", "of many jobs, a folder each"),
    ("overpaint get 3fqk7xw2mzl5a4vn --links", "addresses that anyone can open for an hour"),
)


@click.command(epilog=EXAMPLES)
@click.argument("ids", nargs=-1, metavar="ID...")
@click.option("--group", metavar="NAME", help="Also all jobs of this group.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    metavar="DIR",
    help="Folder to write into, by default this one; several jobs get a folder each in it.",
)
@click.option("--links", is_flag=True, help="Print signed addresses instead of fetching.")
@click.option(
    "--expires",
    type=click.IntRange(1, 604_800),
    default=3600,
    show_default=True,
    metavar="SECONDS",
    help="How long --links can be used; at most a week.",
)
@json_option
@farm_options
@pass_context
def get(
    context: Context,
    *,
    ids: tuple[str, ...],
    group: str | None,
    out: Path,
    links: bool,
    expires: int,
    as_json: bool,
) -> None:
    """Fetch the files of jobs that are done.

    Waits for jobs that have not ended. A job that failed ends the command with that job's error. Prints a
    path (or address) a line.
    """
    with context.farm() as farm:
        names = chosen(farm, ids, group)
        for name in names:
            job = farm.handle(name)
            if links:
                found = job.links(expires)
            else:
                folder = out / name if len(names) > 1 else out
                found = {path.name: str(path) for path in job.save(folder)}
            if as_json:
                emit({"id": name, "links" if links else "files": found})
            else:
                tell("\n".join(found.values()))
