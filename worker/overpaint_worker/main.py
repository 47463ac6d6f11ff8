"""`overpaint-worker`: one worker on one device, or one on each."""

import os
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import structlog

from overpaint_shared.errors import EXIT_SERVICE, OverpaintError, ServiceError, SettingsError, visible
from overpaint_shared.misspelt import misspelt
from overpaint_shared.settings import Settings
from overpaint_worker import logs
from overpaint_worker.control import RemoteControl
from overpaint_worker.cycle import SWITCH_AFTER_S
from overpaint_worker.node import Node
from overpaint_worker.options import ALL_DEVICES, WorkerOptions
from overpaint_worker.registry import SHIPPED, Registry

log = structlog.get_logger(__name__)

VARIABLES = "OVERPAINT_WORKER"
"""Each option can also be given as this, an underscore and its name."""
EPILOG = """
\b
Examples:
  overpaint-worker --device cuda:0 --models sd15,sdxl --registry models.toml
  overpaint-worker --device all --models sd15 --registry models.toml --slots 10
  overpaint-worker --device cpu --models mini --slots 4 --grace 5

\b
Exit codes: 0 stopped as asked, 2 wrong option or setting, 3 Redis or S3 cannot be used, 4 the device is at
fault.
SIGTERM or Ctrl-C: finish what runs within the grace, give the rest back. A second one: give it back now.
"""


@click.command(epilog=EPILOG, context_settings={"show_default": True, "auto_envvar_prefix": VARIABLES})
@click.option(
    "--device", required=True, metavar="cpu|cuda:N|all", help="The device; `all`: one worker on each GPU."
)
@click.option("--models", metavar="NAME,...", help="Whose queues to read.  [default: all of the registry]")
@click.option(
    "--registry",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The model registry, a models.toml.  [env var: OVERPAINT_REGISTRY; default: the shipped miniatures]",
)
@click.option(
    "--warm",
    metavar="NAME,...",
    help="Load these before taking jobs.  [default: the model, where it is one]",
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
@click.option(
    "--spare/--no-spare",
    default=True,
    help="Keep a second engine process warm, for the moment when the engine dies (about 500 MB of memory).",
)
@click.option(
    "--engine-env",
    metavar="NAME,...",
    help="Variables that the engine process gets, too; it gets those of its libraries and no secrets.",
)
@click.option(
    "--remote-control",
    type=click.Choice(["inspect", "all"]),
    default="inspect",
    help="Which commands of Celery to obey: questions, or revoke, shutdown and the like as well.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    help="Serve Prometheus metrics there, each further device one port higher.  [default: nowhere]",
)
@click.option(
    "--metrics-host", default="127.0.0.1", metavar="ADDRESS", help="The address that metrics are served on."
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
    warm: str | None,
    slots: int,
    grace: float,
    switch_after: float,
    name: str | None,
    threads: int,
    hashes: Path | None,
    spare: bool,
    engine_env: str | None,
    remote_control: RemoteControl,
    metrics_port: int | None,
    metrics_host: str,
    json_logs: bool,
    config: Path | None,
) -> None:
    """Render the farm's jobs on one device."""
    if device == ALL_DEVICES:
        from overpaint_worker.supervisor import supervise

        logs.configure(as_json=json_logs)
        sys.exit(supervise(sys.argv[1:], metrics_port, name))
    settings = Settings.load(config)
    logs.configure(as_json=json_logs, secrets=_secrets(settings))
    for note in misspelt(options=_option_variables()):
        log.warning(note, action="worker.misspelt_variable")
    path = registry or settings.registry or SHIPPED
    if path == SHIPPED:
        log.info("no registry is named; the shipped miniatures are rendered", action="worker.miniatures")
    names = _model_names(models, path)
    options = WorkerOptions(
        device=device,
        models=names,
        registry=path,
        slots=slots,
        grace_s=grace,
        switch_after_s=switch_after,
        name=name,
        json_logs=json_logs,
        threads=threads,
        hashes=hashes,
        warm=_warm_names(warm, names),
        spare=spare,
        engine_env=_names(engine_env or ""),
        remote_control=remote_control,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
    )
    run(options, settings)


def run(options: WorkerOptions, settings: Settings) -> None:
    """Run a worker until it is told to stop. Does not return: leaves with its exit code."""
    from overpaint_worker import bootsteps, control

    node = Node(options, settings)
    node.ledger.ping()
    node.store.ping()
    bootsteps.install(node.app, node)
    control.install(node.app, options.remote_control)
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
        click.echo(visible(f"overpaint-worker: {error}"), err=True)
        sys.exit(EXIT_SERVICE if isinstance(error, ServiceError) else error.exit_code)


def _option_variables() -> list[str]:
    return [f"{VARIABLES}_{option.name.upper()}" for option in command.params if option.name]


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
    names = _names(given)
    for name in names:
        if name not in known:
            raise SettingsError(
                f"the registry has no model {name!r}",
                field="--models",
                value=name,
                fix=f"name some of: {', '.join(known) or '(the registry is empty)'}",
            )
    return names


def _warm_names(given: str | None, models: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return models if len(models) == 1 else ()
    return _names(given)


def _names(given: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))


def _secrets(settings: Settings) -> list[str]:
    store, password = settings.store(), urlsplit(settings.redis_url).password
    key = store.secret_key.get_secret_value() if store.secret_key else None
    return [secret for secret in (key, unquote(password or "")) if secret]


if __name__ == "__main__":
    main()
