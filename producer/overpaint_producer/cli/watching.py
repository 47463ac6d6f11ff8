"""`overpaint queues`, `why` and `metrics`: what the farm does, and why a job waits."""

import signal
import threading
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
from overpaint_shared.errors import MissingExtraError

if TYPE_CHECKING:
    from overpaint_producer.why import Why
    from overpaint_shared.ledger import QueueState

INSTALL = "pip install 'overpaint[metrics]'"


@click.command(
    epilog=examples(
        ("overpaint queues", "each model's queue: how long, how fast, done when"),
        ("overpaint queues --json | jq 'select(.depth > 100) | .model'", "the long ones"),
    )
)
@json_option
@farm_options
@pass_context
def queues(context: Context, *, as_json: bool) -> None:
    """Show each model's queue: depth, age, rate, and when it will be empty."""
    with context.farm() as farm:
        found = farm.queues()
    if as_json:
        for queue in found:
            emit(
                {
                    "model": queue.model,
                    "depth": queue.depth,
                    "running": queue.running,
                    "oldest_s": queue.oldest_s,
                    "per_s": queue.per_s,
                    "eta_s": queue.eta_s,
                }
            )
    elif not found:
        say("overpaint: no worker is alive and no job waits")
    else:
        table([_row(queue) for queue in found], ("MODEL", "WAITING", "OLDEST", "RUNNING", "RATE", "EMPTY IN"))


def _row(queue: "QueueState") -> tuple[object, ...]:
    from overpaint_producer.pace import clock

    oldest = "" if queue.oldest_s is None else clock(queue.oldest_s)
    rate = "" if queue.per_s is None else f"{queue.per_s * 60:.1f}/min"
    left = clock(queue.eta_s) if queue.depth else ""
    return (queue.model, queue.depth, oldest, queue.running, rate, left)


@click.command(
    epilog=examples(
        ("overpaint why 3fqk7xw2mzl5a4vn", "its place, and what every worker says to it"),
        ("overpaint why 3fqk7xw2mzl5a4vn --json | jq -r .reason", "a word for a script"),
    )
)
@click.argument("job_id", metavar="ID")
@json_option
@farm_options
@pass_context
def why(context: Context, *, job_id: str, as_json: bool) -> None:
    """Tell why a job waits.

    Its place in the queue, which live workers could take it, and what they do now.
    """
    with context.farm() as farm:
        found = farm.why(job_id)
    if as_json:
        emit(found.to_json())
    else:
        _tell(found)


def _tell(found: "Why") -> None:
    from overpaint_producer.pace import clock
    from overpaint_producer.why import when

    tell(found.text)
    if found.ahead is not None:
        facts = [("waited", clock(found.waited_s)), ("before it", found.ahead), ("starts", when(found.eta_s))]
        table(facts, ("model", found.model))
    rows = [
        (each.worker, each.device, f"{each.running}/{each.slots}", "yes" if each.can else "no", each.why)
        for each in found.workers
    ]
    table(rows, ("WORKER", "DEVICE", "BUSY", "CAN", "NOW"))


@click.command(
    epilog=examples(
        ("overpaint metrics --port 9807", "serve http://127.0.0.1:9807/metrics until Ctrl-C"),
        ("overpaint metrics --once", "print them once, as for a textfile collector"),
    )
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=9807,
    show_default=True,
    metavar="PORT",
    help="Where to serve; 0: a free port.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="The address to serve on."
)
@click.option("--once", is_flag=True, help="Print the metrics and leave.")
@json_option
@farm_options
@pass_context
def metrics(context: Context, *, port: int, host: str, once: bool, as_json: bool) -> None:
    """Serve the farm's metrics for Prometheus.

    One for a farm is enough. Workers serve their own: `overpaint-worker --metrics-port`.
    """
    from overpaint_shared.ledger import Ledger

    try:
        from overpaint_producer import exporter
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"`overpaint metrics` needs {error.name}, which is not installed", fix=INSTALL
        ) from None
    settings = context.settings()
    ledger = Ledger.connect(settings.redis_url, settings.ledger())  # Redis need not be up yet
    if once:
        click.echo(exporter.text(ledger), nl=False)
        return
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    address = f"http://{host}:{exporter.serve(ledger, host, port)}/metrics"
    if as_json:
        emit({"address": address})
    else:
        click.echo(f"serving {address}")
    stop.wait()
