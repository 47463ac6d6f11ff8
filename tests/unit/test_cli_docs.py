"""Help and documentation are kept true: every command and every option is where people look for it."""

import re
from pathlib import Path

import click
import pytest

from overpaint_producer.cli import COMMANDS, EXTRA_MODULES, WORKER_COMMANDS, cli
from overpaint_producer.cli.context import FARM_OPTIONS
from overpaint_producer.cli.jobs import STATES
from overpaint_shared.ledger import JobState
from overpaint_shared.settings import Settings, environment_variable

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
NAMES = [*COMMANDS, *WORKER_COMMANDS]
COMMON = {f"--{name.replace('_', '-')}" for name, _, _ in FARM_OPTIONS} | {"--json", "--help"}


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def section(name: str) -> str:
    """What docs/cli.md says under a command's heading."""
    match = re.search(rf"^### `overpaint {name}.*?(?=^##|\Z)", DOCS, re.DOTALL | re.MULTILINE)
    assert match, f"docs/cli.md has no section for {name}"
    return match[0]


def options(name: str) -> set[str]:
    found = command(name)
    parts = [found, *(found.commands.values() if isinstance(found, click.Group) else ())]
    params = [param for part in parts for param in part.params]
    return {flag for param in params if isinstance(param, click.Option) for flag in param.opts}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_documented(name: str) -> None:
    told = section(name)
    missing = {flag for flag in options(name) - COMMON if f"`{flag}" not in told}
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_no_option_is_documented_that_is_not_there(name: str) -> None:
    told = set(re.findall(r"`(--[a-z0-9-]+)", section(name)))
    assert told <= options(name) | COMMON


def test_the_farms_options_are_documented_with_their_variables() -> None:
    for name, _, _ in FARM_OPTIONS:
        assert f"`--{name.replace('_', '-')}" in DOCS
        assert f"`{environment_variable(name)}`" in DOCS
        assert name == "config" or name in Settings.model_fields


@pytest.mark.parametrize("name", NAMES)
def test_the_list_of_commands_says_what_a_commands_own_help_says(name: str) -> None:
    listed = COMMANDS[name][1] if name in COMMANDS else WORKER_COMMANDS[name]
    own = command(name)
    assert (own.help or "").split("\n\n")[0].replace("\n", " ").strip() == listed


@pytest.mark.parametrize("name", NAMES)
def test_help_ends_in_worked_examples(name: str) -> None:
    own = command(name)
    shown = own.get_help(click.Context(own, info_name=name))
    assert f"overpaint {name}" in shown.split("Example", 1)[-1]
    assert "Example" in shown


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in {"schema", "version"}])
def test_help_shows_the_variables_of_the_farms_options(name: str) -> None:
    own = command(name)
    shown = own.get_help(click.Context(own, info_name=name))
    assert "OVERPAINT_REDIS_URL" in re.sub(r"\s+", "", shown)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_speaks_json(name: str) -> None:
    assert "--json" in options(name)


def test_the_states_of_the_jobs_command_are_the_ledgers() -> None:
    assert set(STATES) == set(JobState)


def test_the_library_is_documented() -> None:
    from overpaint_producer.client import Farm, Job

    for kind in (Farm, Job):
        public = [name for name in vars(kind) if not name.startswith("_") and callable(getattr(kind, name))]
        assert [name for name in public if f"{name}(" not in LIBRARY] == [], kind


def test_the_extra_is_told_by_its_own_modules() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{module}>=' in pyproject for module in EXTRA_MODULES)
