"""A variable that is almost a setting is told; those of a deployment are not."""

import re
from pathlib import Path

import pytest

from overpaint_shared.misspelt import misspelt

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("OVERPAINT_REDIS_URI", "OVERPAINT_REDIS_URL"),
        ("OVERPAINT_REDISURL", "OVERPAINT_REDIS_URL"),
        ("OVERPAINT_S3_ENDPOINT", "OVERPAINT_S3_ENDPOINT_URL"),
        ("OVERPAINT_SECRET_KEY", "OVERPAINT_S3_SECRET_KEY"),
        ("OVERPAINT_BUCKET", "OVERPAINT_S3_BUCKET"),
        ("OVERPAINT_CONFI", "OVERPAINT_CONFIG"),
    ],
)
def test_a_misspelt_setting_is_told_with_the_one_that_was_meant(given: str, meant: str) -> None:
    assert misspelt({given: "hunter2"}) == [f"{given} is no setting and has no effect. Did you mean {meant}?"]


def test_what_is_read_and_what_is_somebody_elses_is_not_told() -> None:
    assert (
        misspelt({"OVERPAINT_REDIS_URL": "", "OVERPAINT_CONFIG": "", "OVERPAINT_HOME": "", "REDIS_URI": ""})
        == []
    )
    assert misspelt({"OVERPAINT_WORKER_SLOTS": "1"}, ["OVERPAINT_WORKER_SLOTS"]) == []
    (said,) = misspelt({"OVERPAINT_WORKER_SLOT": "1"}, ["OVERPAINT_WORKER_SLOTS"])
    assert "OVERPAINT_WORKER_SLOTS" in said


def test_no_name_that_a_deployment_uses_is_told() -> None:
    files = [ROOT / "docker-compose.yml", *(path for path in (ROOT / "deploy").rglob("*") if path.is_file())]
    text = "".join(path.read_text(errors="replace") for path in files)
    used = dict.fromkeys(re.findall(r"OVERPAINT_[A-Z0-9_]*[A-Z0-9]", text), "")
    assert len(used) > 20
    assert misspelt(used) == []
