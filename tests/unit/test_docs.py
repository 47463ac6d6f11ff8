"""What the documents tell people to type and to read is there."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from overpaint_producer.cli import cli, worker_command
from overpaint_shared.job import ClipsegMask, parse_job
from overpaint_shared.spec.masks import leaves
from overpaint_worker.main import command as overpaint_worker
from overpaint_worker.registry import SHIPPED, Registry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"./up", "./test", "./check"}


def typed(page: Path) -> list[list[str]]:
    """The words of every line after a `$` in the page's console blocks, without what follows a `#`."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line, comments=True) for line in lines]


LINES = [(page.name, words) for page in PAGES for words in typed(page)]


def test_the_readme_says_what_to_type() -> None:
    assert len([words for name, words in LINES if name == "README.md"]) >= 8


@pytest.mark.parametrize(
    ("page", "words"), LINES, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_every_command_in_a_document_exists_with_its_options(page: str, words: list[str]) -> None:
    program, *rest = words
    if program in SCRIPTS:
        assert (ROOT / program).stat().st_mode & 0o111
        command = cli.get_command(click.Context(cli), "up") if program == "./up" else None
    elif program == "overpaint":
        name, *rest = rest
        command = cli.get_command(click.Context(cli), name) or worker_command(name)
    elif program == "overpaint-worker":
        command = overpaint_worker
    else:
        assert (
            program in (".", "pip", "docker", "kubectl")
            or (ROOT / program).exists()
            or program.startswith(".venv/bin/")
        ), program
        command = None
    if command is not None:
        options = {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert [word for word in rest if word.startswith("--") and word.split("=")[0] not in options] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def jobs(page: Path) -> list[str]:
    """The page's JSON blocks that are jobs; others are receipts, answers and the like."""
    return [
        block
        for block in re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)
        if '"method"' in block
    ]


@pytest.mark.parametrize("name", ["methods.md", "masks.md", "job-spec.md"])
def test_every_job_in_a_document_is_one(name: str) -> None:
    written = jobs(ROOT / "docs" / name)
    assert len(written) >= 2
    assert [parse_job(job).version for job in written] == [1] * len(written)


def test_the_page_of_methods_has_a_job_for_each() -> None:
    """Each is one that the shipped models render."""
    found = [parse_job(job) for job in jobs(ROOT / "docs" / "methods.md")]
    kinds = [
        "vae_encode_inpaint",
        "latent_noise_mask",
        "controlnet_inpaint",
        "latent_noise_mask",
        "inpaint_model",
    ]
    assert [job.method.kind for job in found] == kinds
    shipped = Registry.load(SHIPPED)
    for job in found:
        assert shipped.model(job.model)
        assert getattr(job.method, "controlnet", "mini-inpaint") in shipped.controlnets
        for _, part in leaves(job.mask) if job.mask is not None else ():
            assert not isinstance(part, ClipsegMask) or part.segmenter in shipped.segmenters


def test_the_readmes_job_is_one() -> None:
    (job,) = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert parse_job(json.loads(job)).method.kind == "latent_noise_mask"


def test_the_readmes_program_uses_the_library_as_it_is() -> None:
    from overpaint_producer.client import Farm, Job

    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    compile(program, "README.md", "exec")
    assert all(hasattr(Farm, name) for name in re.findall(r"\b(?:farm|Farm)\.(\w+)", program))
    assert all(hasattr(Job, name) for name in re.findall(r"\bjob\.(\w+)\(", program))
