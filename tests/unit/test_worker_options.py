import re
from pathlib import Path
from typing import Any

import pytest

from overpaint_shared.errors import SettingsError
from overpaint_worker.engine_process import engine_environment
from overpaint_worker.main import _warm_names, command
from overpaint_worker.options import WorkerOptions


def options(**changes: Any) -> WorkerOptions:
    given: dict[str, Any] = {"device": "cpu", "models": ("tiny",), "registry": Path("models.toml")}
    return WorkerOptions(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"device": "gpu"}, "--device"),
        ({"device": "cuda:x"}, "--device"),
        ({"device": "all"}, "--device"),
        ({"models": ()}, "--models"),
        ({"warm": ("other",)}, "--warm"),
        ({"metrics_port": 65_536}, "--metrics-port"),
        ({"metrics_port": -1}, "--metrics-port"),
        ({"slots": 0}, "--slots"),
        ({"slots": 257}, "--slots"),
        ({"grace_s": -1.0}, "--grace"),
        ({"grace_s": float("nan")}, "--grace"),
        ({"grace_s": float("inf")}, "--grace"),
        ({"name": "a b"}, "--name"),
        ({"name": "a@b"}, "--name"),
        ({"engine_env": ("A B",)}, "--engine-env"),
        ({"engine_env": ("OVERPAINT_REDIS_URL",)}, "--engine-env"),
        ({"engine_env": ("AWS_SECRET_ACCESS_KEY",)}, "--engine-env"),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError) as caught:
        options(**changes)
    assert caught.value.field == field
    assert caught.value.fix


@pytest.mark.parametrize(
    ("device", "shown", "pinned"),
    [
        ("cpu", "0,1", ""),
        ("cuda:0", "", "0"),
        ("cuda", "", "0"),
        ("cuda:3", "", "3"),
        ("cuda:1", "4,7", "7"),
        ("cuda:0", "GPU-aaaa, GPU-bbbb", "GPU-aaaa"),
    ],
)
def test_the_engine_sees_its_own_device_only(device: str, shown: str, pinned: str) -> None:
    assert options(device=device).visible_devices({"CUDA_VISIBLE_DEVICES": shown}) == pinned


def test_a_device_that_is_not_shown_is_refused() -> None:
    with pytest.raises(SettingsError, match="cuda:2"):
        options(device="cuda:2").visible_devices({"CUDA_VISIBLE_DEVICES": "4,7"})


def test_the_engine_does_not_get_the_farms_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "OVERPAINT_REDIS_URL",
        "OVERPAINT_S3_SECRET_KEY",
        "OVERPAINT_S3_ACCESS_KEY",
        "AWS_SECRET_ACCESS_KEY",
    ):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = engine_environment("2")
    assert "hush" not in environment.values()
    assert environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("given", "models", "warm"),
    [
        (None, ("tiny",), ("tiny",)),
        (None, ("a", "b"), ()),
        ("b", ("a", "b"), ("b",)),
        (" b, a,b", ("a", "b"), ("b", "a")),
        ("", ("tiny",), ()),
    ],
)
def test_the_only_model_is_warm_and_of_several_those_that_are_named(
    given: str | None, models: tuple[str, ...], warm: tuple[str, ...]
) -> None:
    assert _warm_names(given, models) == warm


def test_every_option_of_the_worker_is_documented_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "worker.md").read_text(encoding="utf-8")
    section = text.partition("\n## Options")[2].partition("\n## ")[0]
    told = set(re.findall(r"^\| `(--[a-z-]+)` \|", section, re.MULTILINE))
    assert told == {flag for parameter in command.params for flag in parameter.opts}
