"""`overpaint up`: a whole farm on this machine, and its demo."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

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
from overpaint_shared.errors import EXIT_DONE, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from overpaint_producer.demo import Rendered
    from overpaint_producer.local import LocalFarm

EPILOG = examples(
    ("overpaint up", "the farm with the miniature models, until Ctrl-C"),
    ("overpaint up --once", "the same, but stop when the demo is done"),
    ("overpaint up --registry models.toml --device cuda:0", "your own models on a GPU"),
)


@click.command(epilog=EPILOG)
@click.option("--once", is_flag=True, help="Stop when the demo is done.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default="overpaint-data",
    show_default=True,
    help="Folder of everything: data, logs, the demo's pictures.",
)
@click.option(
    "--registry",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The worker's models.toml; without it, the shipped miniatures.",
)
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda:N|all", help="What renders.")
@click.option(
    "--slots", default=6, show_default=True, metavar="N", help="Jobs that the worker holds at once."
)
@click.option("--no-demo", is_flag=True, help="Render no demo.")
@json_option
@farm_options
@pass_context
def up(context: Context, /, *, as_json: bool, once: bool, no_demo: bool, **options: Any) -> int:
    """Start a whole farm on this machine: Redis, S3, a worker and Flower. Ctrl-C stops it.

    A service that the options, the environment or the configuration name is used, not started. What ends by
    itself is started again, unless it does so again and again.
    """
    from overpaint_producer.local import LocalFarm, Plan
    from overpaint_producer.local_folder import clear

    clear(options["data"])
    plan = Plan(settings=context.settings(), **options)
    farm = LocalFarm(plan, say)
    _Signals(farm).install()
    ready = False
    try:
        with farm:
            say(f"\nOverpaint runs.\n{farm.screen()}\n")
            if as_json:
                emit(
                    {
                        "event": "ready",
                        "config": str(farm.config),
                        "parts": {p.name: p.where for p in farm.parts},
                    }
                )
            if not no_demo:
                _demo(farm, as_json=as_json)
            ready = True
            if not once:
                say("Ctrl-C stops it. Meanwhile, in another terminal: overpaint submit JOB.json --wait")
                threading.Event().wait()
    except KeyboardInterrupt:
        if farm.given_up is not None:
            raise farm.given_up from None
        return EXIT_DONE if ready else EXIT_INTERRUPTED
    return EXIT_DONE


class _Signals:
    """The first SIGINT, SIGTERM or SIGHUP stops in order, the second hurries, any more end all at once."""

    def __init__(self, farm: "LocalFarm") -> None:
        self._farm = farm
        self._asked = 0

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._asked += 1
        if self._asked == 1:
            raise KeyboardInterrupt
        if self._asked == 2:
            self._farm.hurry()
        else:
            self._farm.kill()


def _demo(farm: "LocalFarm", *, as_json: bool) -> None:
    from overpaint_producer import demo

    say("Demo: a cat becomes a dog, by every method that the models can do")
    with farm.connect() as client:
        made = demo.render(client, farm.data / "demo", say=lambda line: say(f"  {line}"))
    say(f"  look at {farm.shown(made.sheet)}\n")
    if as_json:
        emit(_described(made))


def _described(made: "Rendered") -> dict[str, Any]:
    pictures = [str(path) for path in made.pictures]
    return {"event": "demo", "sheet": str(made.sheet), "pictures": pictures, "keys": list(made.keys)}
