"""What may be imported when: the producer never needs torch, and help needs next to nothing."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import overpaint_producer
import overpaint_shared

HEAVY = {"torch", "diffusers", "transformers", "numpy", "scipy"}
NOT_FOR_HELP = HEAVY | {
    "boto3",
    "botocore",
    "celery",
    "kombu",
    "redis",
    "pydantic",
    "PIL",
    "rich",
    "structlog",
}


def modules() -> list[str]:
    """Every module of both packages, but those that run when imported."""
    found = []
    for package in (overpaint_shared, overpaint_producer):
        found += [each.name for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return [name for name in found if not name.endswith("__main__")]


def loaded_after(code: str, *argv: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `code`."""
    tail = (
        "\nimport sys, json; print('LOADED' + json.dumps([name.partition('.')[0] for name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + tail, *argv], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.rpartition("LOADED")[2]))


def test_producer_and_shared_import_none_of_the_engines_libraries() -> None:
    names = modules()
    assert {"overpaint_producer.client", "overpaint_producer.cli.submit", "overpaint_shared.store"} <= set(
        names
    )
    loaded = loaded_after("\n".join(f"import {name}" for name in names))
    assert {"boto3", "celery", "redis", "pydantic"} <= loaded  # or this test sees nothing
    assert not loaded & HEAVY


RUN = "import sys\nfrom overpaint_producer.cli import run\nrun(sys.argv[1:])"


def test_help_imports_nothing_it_does_not_need() -> None:
    loaded = loaded_after(RUN, "--help")
    assert "click" in loaded
    assert not loaded & NOT_FOR_HELP


def test_the_help_of_a_command_imports_no_service_and_no_engine() -> None:
    from overpaint_producer.cli import COMMANDS

    for name in COMMANDS:
        assert not loaded_after(RUN, name, "--help") & NOT_FOR_HELP, name


def test_the_help_of_the_workers_commands_imports_no_engine() -> None:
    for name in ("render", "prepare", "mask", "rerender"):
        assert not loaded_after(RUN, name, "--help") & HEAVY, name


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        return None if name in {"torch", "diffusers"} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [each for each in sys.meta_path if each is not PathFinder] + [NoTorch()]
from overpaint_producer.cli import main
main(sys.argv[1:])
"""


def test_without_the_extra_its_commands_are_shown_and_say_what_to_install(tmp_path: Path) -> None:
    def overpaint(*argv: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", WITHOUT_TORCH, *argv]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert "render " in overpaint("--help").stdout
    assert "pip install 'overpaint[worker]'" in overpaint("render", "--help").stdout
    refused = overpaint("render", "job.json", "--registry", "models.toml", "--out", ".")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("overpaint: ")
    assert "pip install 'overpaint[worker]'" in refused.stderr
    told = overpaint("prepare", "job.json", "--json")
    assert (told.returncode, json.loads(told.stderr)["error"]["code"]) == (2, "missing_extra")
