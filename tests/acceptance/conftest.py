"""A farm whose worker is worked by hand, and folders to type commands in."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from overpaint_producer.client import Farm
from overpaint_shared.settings import Settings
from tests.acceptance.commands import Shell, environment
from tests.integration.hand import Hand, job, png, working


@pytest.fixture
def farm(farm_settings: Settings) -> Iterator[Farm]:
    with Farm.connect(farm_settings) as farm:
        yield farm


@pytest.fixture
def hand(farm: Farm) -> Iterator[Hand]:
    with working(farm) as hand:
        yield hand


@pytest.fixture
def shell(farm_settings: Settings, tmp_path: Path) -> Shell:
    (tmp_path / "photo.png").write_bytes(png())
    (tmp_path / "job.json").write_text(json.dumps(job(), indent=2))
    return Shell(tmp_path, environment(farm_settings))


@pytest.fixture
def bare(tmp_path: Path) -> Shell:
    """A folder and no farm."""
    (tmp_path / "job.json").write_text(json.dumps(job()))
    return Shell(tmp_path, environment())
