"""The engine process holds no secret of the farm, in whichever way the farm is deployed."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from overpaint_shared.settings import Limits
from overpaint_worker.engine_process import EngineProcess
from overpaint_worker.node import _launch
from overpaint_worker.options import WorkerOptions
from tests import fake_engine

DEPLOY = Path(__file__).parents[2] / "deploy"
SECRET = "hush-hush-hush-hush"
FILE = "/run/secrets/hush"

OPERATORS_OWN = {
    "REDISCLI_AUTH": SECRET,
    "AWS_ACCESS_KEY_ID": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": SECRET,
    "AWS_SHARED_CREDENTIALS_FILE": FILE,
    "OVERPAINT_CONFIG": FILE,
    "OVERPAINT_REDIS_WORKER_PASSWORD": SECRET,
    "HF_TOKEN": SECRET,
    "HUGGING_FACE_HUB_TOKEN": SECRET,
    "HTTPS_PROXY": f"http://user:{SECRET}@proxy:3128",
    "PYTORCH_SECRET": SECRET,
    "KUBERNETES_SERVICE_TOKEN": SECRET,
    "DATABASE_URL": f"postgres://{SECRET}",
}


def compose() -> dict[str, str]:
    """What `deploy/worker.yml` gives a worker."""
    service = yaml.safe_load((DEPLOY / "worker.yml").read_text())["services"]["common"]
    return dict.fromkeys(service["environment"], SECRET)


def kubernetes() -> dict[str, str]:
    """What the worker's deployment gives it."""
    documents = yaml.safe_load_all((DEPLOY / "kubernetes/worker/deployment.yaml").read_text())
    pod = next(document for document in documents if document["kind"] == "Deployment")["spec"]["template"]
    given = {entry["name"]: SECRET for entry in pod["spec"]["containers"][0]["env"]}
    assert "REDIS_PASSWORD" in given
    return given


def systemd() -> dict[str, str]:
    """What `deploy/worker-env` writes into worker.env."""
    text = (DEPLOY / "worker-env").read_text().partition("<<END\n")[2].partition("\nEND\n")[0]
    given = {line.partition("=")[0]: SECRET for line in text.splitlines()}
    assert "OVERPAINT_REDIS_WORKER_PASSWORD" in given
    return given


def seen(process: EngineProcess) -> tuple[dict[str, str], str]:
    """The environment and the command line of a process, as the kernel shows them."""
    folder = Path(f"/proc/{process.popen.pid}")
    environment = (folder / "environ").read_bytes().decode().split("\0")
    pairs = (entry.partition("=")[::2] for entry in environment if entry)
    return dict(pairs), (folder / "cmdline").read_bytes().decode()


def started(**more: Any) -> EngineProcess:
    options = WorkerOptions(
        device="cpu",
        models=("tiny",),
        registry=Path("models.toml"),
        engine=(sys.executable, fake_engine.__file__),
        **more,
    )
    process = EngineProcess(_launch(options, Limits()))
    process.read()  # its program runs, so the kernel shows its own environment
    return process


@pytest.fixture(params=[compose, kubernetes, systemd, lambda: OPERATORS_OWN])
def deployed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    given: dict[str, str] = request.param()
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return given


def test_no_secret_of_a_deployment_is_in_the_engines_environment_or_command_line(
    deployed: Mapping[str, str],
) -> None:
    process = started()
    try:
        environment, command = seen(process)
    finally:
        process.reap()
    assert environment.keys().isdisjoint(deployed)
    shown = "".join(environment.values()) + command
    assert SECRET not in shown
    assert FILE not in shown


def test_the_engine_gets_what_its_libraries_and_its_driver_read(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {
        "LD_LIBRARY_PATH": "/usr/local/cuda/lib64",
        "LC_ALL": "C.UTF-8",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "HIP_VISIBLE_DEVICES": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_HOME": "/var/cache/torch",
        "TRITON_CACHE_DIR": "/var/cache/triton",
        "XDG_CACHE_HOME": "/var/cache",
        "TMPDIR": "/var/cache/tmp",
    }
    for name, value in (wanted | {"ODD_DRIVER": "on", "ODDER_DRIVER": "on"}).items():
        monkeypatch.setenv(name, value)
    process = started(engine_env=("ODD_DRIVER",))
    try:
        environment, _ = seen(process)
    finally:
        process.reap()
    assert wanted.items() <= environment.items()
    assert environment["ODD_DRIVER"] == "on"
    assert "ODDER_DRIVER" not in environment
