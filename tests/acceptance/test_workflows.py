"""ComfyUI workflows and known mistakes on the command line, as typed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from overpaint_producer.client import Farm
from overpaint_shared.settings import Settings
from tests.acceptance.commands import Shell, environment
from tests.integration.hand import Hand, spec_of, working
from tests.unit.workflows import changed, graph, grey, node


@pytest.fixture
def bare(tmp_path: Path) -> Shell:
    """A folder with a workflow and its picture, and no farm."""
    (tmp_path / "input").mkdir()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "input" / "photo.png")
    (tmp_path / "workflow.json").write_text(json.dumps(graph(grey())))
    return Shell(tmp_path, environment())


@pytest.fixture
def hand(farm_settings: Settings) -> Iterator[Hand]:
    with Farm.connect(farm_settings) as farm, working(farm) as hand:
        yield hand


@pytest.fixture
def shell(bare: Shell, farm_settings: Settings) -> Shell:
    return Shell(bare.folder, environment(farm_settings))


MAP = ("--model-map", "v1-5-pruned.safetensors=tiny")


def test_convert_prints_a_job_that_validates_with_its_mistakes(bare: Shell) -> None:
    converted = bare.overpaint("convert", "workflow.json", *MAP)
    assert (converted.code, converted.err) == (0, "")
    (bare.folder / "job.json").write_text(converted.out)
    (bare.folder / "photo.png").write_bytes((bare.folder / "input" / "photo.png").read_bytes())
    checked = bare.overpaint("validate", "job.json", "--json")
    (row,) = checked.lines
    assert (checked.code, row["ok"]) == (0, True)
    assert [text for text in row["warnings"] if "grey" in text]  # the graph's denoise is 0.6
    assert "note: sampling.denoise" in bare.overpaint("validate", "workflow.json", *MAP).err


def test_convert_writes_files_from_which_the_pictures_are_found(bare: Shell) -> None:
    second = {
        "n12": node("VAEDecode", samples=["13", 0], vae=["4", 2]),
        "n14": node("PreviewImage", images=["12", 0]),
    }
    made = graph(**second, n13=changed(graph(), "3", seed=8)["3"])
    (bare.folder / "two.json").write_text(json.dumps(made))
    result = bare.overpaint("convert", "two.json", *MAP, "--input-dir", "input", "--out", "jobs", "--json")
    assert result.code == 0, result.err
    assert [(row["nodes"], row["spec"]["sampling"]["seed"]) for row in result.lines] == [
        (["9"], 7),
        (["14"], 8),
    ]
    for row in result.lines:
        job = json.loads((bare.folder / row["saved"]).read_text())
        assert (
            bare.folder / "jobs" / job["source"]["image"]
        ).resolve() == bare.folder / "input" / "photo.png"


def test_convert_refuses_by_node_with_exit_code_2(bare: Shell) -> None:
    (bare.folder / "bad.json").write_text(json.dumps(changed(graph(), "3", sampler_name="eulr")))
    result = bare.overpaint("convert", "bad.json", *MAP)
    assert (result.code, result.out) == (2, "")
    assert "node 3 (KSampler).sampler_name" in result.err
    assert "Did you mean euler?" in result.err


def test_submit_takes_a_workflow_and_its_variants(shell: Shell, hand: Hand) -> None:
    result = shell.overpaint(
        "submit", "workflow.json", *MAP, "--input-dir", "input", "--seeds", "1..2", "--json"
    )
    assert result.code == 0, result.err
    specs = [spec_of(hand.farm, row["id"]) for row in result.lines]
    assert [spec["sampling"]["seed"] for spec in specs] == [1, 2]
    assert specs[0]["source"]["image"].startswith("sha256:")
    assert all(any("grey" in text for text in row["warnings"]) for row in result.lines)
    assert result.err.count("leaves some of the grey") == 1


def test_submit_does_not_guess_a_name(shell: Shell, hand: Hand) -> None:
    result = shell.overpaint("submit", "workflow.json", "--input-dir", "input")
    assert (result.code, result.out) == (2, "")
    assert "node 4 (CheckpointLoaderSimple).ckpt_name" in result.err
    assert "--model-map v1-5-pruned.safetensors=NAME" in result.err


def test_submit_without_a_live_worker_refuses_a_name_that_is_not_mapped(shell: Shell) -> None:
    result = shell.overpaint("submit", "workflow.json", "--input-dir", "input")
    assert (result.code, "no worker is alive" in result.err) == (2, True)
