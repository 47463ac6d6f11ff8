"""`overpaint-worker`: one worker on one device, or one on each."""

import os
import sys
import threading
from pathlib import Path

import click
import structlog

from overpaint_shared.errors import EXIT_SERVICE, OverpaintError, ServiceError, SettingsError
from overpaint_shared.settings import Settings
from overpaint_worker import logs
from overpaint_worker.cycle import SWITCH_AFTER_S
from overpaint_worker.node import Node
from overpaint_worker.options import ALL_DEVICES, WorkerOptions
from overpaint_worker.registry import Registry

log = structlog.get_logger(__name__)

EPILOG = """
\b
Examples:
  overpaint-worker --device cuda:0 --models sd15,sdxl --registry models.toml
  overpaint-worker --device all --models sd15 --registry models.toml --slots 10
  overpaint-worker --device cpu --models tiny --registry models.toml --slots 4 --grace 5

\b
Exit codes: 0 stopped as asked, 2 wrong option or setting, 3 Redis or S3 cannot be used, 4 the device is at
fault.
SIGTERM or Ctrl-C: finish what runs within the grace, give the rest back. A second one: give it back now.
"""


@click.command(
    epilog=EPILOG, context_settings={"show_default": True, "auto_envvar_prefix": "OVERPAINT_WORKER"}
)
@click.option(
    "--device", required=True, metavar="cpu|cuda:N|all", help="The device; `all`: one worker on each GPU."
)
@click.option("--models", metavar="NAME,...", help="Whose queues to read.  [default: all of the registry]")
@click.option(
    "--registry",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The model registry, a models.toml.  [env var: OVERPAINT_REGISTRY]",
)
@click.option("--slots", default=6, metavar="N", help="Jobs held at once: the batch limit and two.")
@click.option("--grace", default=60.0, metavar="SECONDS", help="Time to finish what runs after SIGTERM.")
@click.option(
    "--switch-after", default=SWITCH_AFTER_S, metavar="SECONDS", help="How long another model's jobs wait."
)
@click.option(
    "--name", metavar="NAME", help="Shown in Flower, before the host.  [default: device and part of an id]"
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="CPU threads of the engine's arithmetic.",
)
@click.option(
    "--hashes",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where the digests of weights are remembered between starts.",
)
@click.option("--json-logs", is_flag=True, help="Log JSON lines.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The farm's settings (TOML).  [env var: OVERPAINT_CONFIG]",
)
def command(  # noqa: PLR0917  # click gives them by name
    device: str,
    models: str | None,
    registry: Path | None,
    slots: int,
    grace: float,
    switch_after: float,
    name: str | None,
    threads: int,
    hashes: Path | None,
    json_logs: bool,
    config: Path | None,
) -> None:
    """Render the farm's jobs on one device."""
    if device == ALL_DEVICES:
        from overpaint_worker.supervisor import supervise

        logs.configure(as_json=json_logs)
        sys.exit(supervise(sys.argv[1:]))
    settings = Settings.load(config)
    logs.configure(as_json=json_logs, secrets=_secrets(settings))
    path = registry or settings.registry
    if path is None:
        raise SettingsError("no registry is named", field="--registry", fix="write --registry models.toml")
    options = WorkerOptions(
        device=device,
        models=_model_names(models, path),
        registry=path,
        slots=slots,
        grace_s=grace,
        switch_after_s=switch_after,
        name=name,
        json_logs=json_logs,
        threads=threads,
        hashes=hashes,
    )
    run(options, settings)


def run(options: WorkerOptions, settings: Settings) -> None:
    """Run a worker until it is told to stop. Does not return: leaves with its exit code."""
    from overpaint_worker import bootsteps

    node = Node(options, settings)
    node.ledger.ping()
    node.store.ping()
    bootsteps.install(node.app, node)
    worker = node.app.Worker(
        hostname=node.name,
        pool="threads",
        concurrency=options.slots,
        loglevel="INFO",
        without_gossip=True,
        without_mingle=True,
        task_events=True,
        quiet=True,
    )
    worker.start()
    code = int(worker.exitcode or 0)
    log.info("worker left", action="worker.left", exit_code=code)
    _leave(code)


def main() -> None:
    """The program. An expected failure is one line on standard error."""
    try:
        command.main(standalone_mode=True)
    except OverpaintError as error:
        click.echo(f"overpaint-worker: {error}", err=True)
        sys.exit(EXIT_SERVICE if isinstance(error, ServiceError) else error.exit_code)


def _leave(code: int) -> None:
    """Exit, without waiting for threads that hang in a download."""
    sys.stdout.flush()
    sys.stderr.flush()
    if threading.active_count() > 1:
        os._exit(code)
    sys.exit(code)


def _model_names(given: str | None, path: Path) -> tuple[str, ...]:
    known = tuple(Registry.load(path).models)
    if given is None:
        return known
    names = tuple(dict.fromkeys(n.strip() for n in given.split(",") if n.strip()))
    for name in names:
        if name not in known:
            raise SettingsError(
                f"the registry has no model {name!r}",
                field="--models",
                value=name,
                fix=f"name some of: {', '.join(known) or '(the registry is empty)'}",
            )
    return names


def _secrets(settings: Settings) -> list[str]:
    store = settings.store()
    return [store.secret_key.get_secret_value()] if store.secret_key else []


if __name__ == "__main__":
    main()
