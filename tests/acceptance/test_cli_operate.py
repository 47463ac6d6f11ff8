"""The commands that check jobs and look after a farm, as typed; and how all commands fail."""

import json
import signal
import urllib.request
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from PIL import Image

from overpaint_producer import garbage
from overpaint_producer.client import Farm
from overpaint_producer.services import free_ports
from overpaint_shared import __version__
from tests.acceptance.commands import Shell
from tests.integration.hand import Hand, job, png

# quota


def test_quota_tells_and_sets_what_an_owner_may_have(shell: Shell, farm: Farm) -> None:
    assert shell.overpaint("quota").out.splitlines()[1].split() == ["max_queued", "100000", "0", "everyone's"]
    (told,) = shell.overpaint("quota", "--max-queued", "2", "--submits-per-s", "0", "--json").lines
    assert (told["max_queued"], told["submits_per_s"], told["own"]) == (2, 0, ["max_queued", "submits_per_s"])
    farm.submit_many([shell.folder / "job.json"] * 2)
    refused = shell.overpaint("submit", "job.json")
    assert (refused.code, refused.out) == (1, "")
    assert "max_queued: owner default has 2 jobs waiting, and may have 2 (try again when some" in refused.err
    shell.overpaint("quota", "--max-queued", "default")
    assert shell.overpaint("submit", "job.json").code == 0
    assert "write a number" in shell.overpaint("quota", "--max-queued", "many").err


# validate, schema, workers, gc, version


def test_validate_needs_no_farm(bare: Shell) -> None:
    Image.new("RGB", (64, 64)).save(bare.folder / "photo.png")
    result = bare.overpaint("validate", "job.json")
    assert (result.code, result.out, result.err) == (0, "job.json: ok\n", "")


def test_validate_refuses_each_picture_that_submit_would_refuse(bare: Shell) -> None:
    (bare.folder / "text.png").write_text("no picture")
    mask = {"from": "image", "image": "text.png"}
    (bare.folder / "a.json").write_text(json.dumps(job(source={"image": "gone.png"}, mask=mask)))
    result = bare.overpaint("validate", "a.json")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("overpaint: a.json: source.image: cannot read gone.png: No such file")
    assert "mask.image: text.png is not a picture" in result.err
    (told,) = bare.overpaint("validate", "a.json", "--json").lines
    assert (told["ok"], told["error"]["code"], told["error"]["field"]) == (False, "input", "source.image")


def test_validate_refuses_a_mask_of_another_size(bare: Shell) -> None:
    (bare.folder / "photo.png").write_bytes(png())
    (bare.folder / "mask.png").write_bytes(png(size=(32, 48)))
    mask = {"from": "image", "image": "mask.png"}
    (bare.folder / "job.json").write_text(json.dumps(job(mask=mask)))
    result = bare.overpaint("validate", "job.json")
    assert (result.code, result.out) == (2, "")
    assert "mask.image: the mask is 32 x 48 pixels, but the source is 64 x 48." in result.err


def test_validate_tells_all_problems_of_all_files(bare: Shell) -> None:
    (bare.folder / "photo.png").write_bytes(png())
    (bare.folder / "a.json").write_text(json.dumps(job(sampling={"steps": "many", "seed": -1})))
    (bare.folder / "b.json").write_text("{")
    result = bare.overpaint("validate", "a.json", "missing.json", "b.json", "job.json")
    assert result.code == 2
    assert result.out == "job.json: ok\n"
    for words in ("sampling.steps", "sampling.seed", "missing.json", "b.json"):
        assert words in result.err
    told = bare.overpaint("validate", "a.json", "job.json", "--json")
    assert [line["ok"] for line in told.lines] == [False, True]
    assert {problem["path"] for problem in told.lines[0]["error"]["problems"]} == {
        "sampling.steps",
        "sampling.seed",
    }


def test_validate_asks_the_farms_workers_when_told_to(shell: Shell, hand: Hand) -> None:
    (shell.folder / "photo.png").write_bytes(png())
    (shell.folder / "other.json").write_text(json.dumps(job(model="tinny")))
    assert shell.overpaint("validate", "other.json").code == 0
    result = shell.overpaint("validate", "other.json", "--farm")
    assert result.code == 2
    assert "Did you mean tiny?" in result.err


def test_the_schema_is_json_and_knows_the_job(bare: Shell) -> None:
    schema = json.loads(bare.overpaint("schema").out)
    assert {"version", "model", "source", "method"} <= set(schema["properties"])


def test_workers_lists_those_that_live(shell: Shell, farm: Farm, hand: Hand) -> None:
    assert "hand@here" in shell.overpaint("workers").out
    (worker,) = shell.overpaint("workers", "--json").lines
    assert (worker["name"], worker["models"]) == ("hand@here", ["tiny"])
    (record,) = farm.workers()
    others = ({"kind": "controlnet", "name": "canny"}, {"kind": "segmenter", "name": "clipseg"})
    farm.ledger.announce(replace(record, catalogue=(*record.catalogue, *others)))
    assert "hand@here also has controlnets canny; segmenters clipseg\n" in shell.overpaint("workers").out
    farm.ledger.retire(hand.id)
    none = shell.overpaint("workers")
    assert (none.code, none.out) == (0, "")
    assert "overpaint-worker" in none.err


def test_queues_shows_depth_age_rate_and_when_it_is_empty(shell: Shell, farm: Farm, hand: Hand) -> None:
    done, *_ = [farm.submit(job(), folder=shell.folder) for _ in range(3)]
    hand.render(done.id)
    (queue,) = shell.overpaint("queues", "--json").lines
    assert (queue["model"], queue["depth"], queue["running"]) == ("tiny", 2, 0)
    assert queue["oldest_s"] > 0
    assert queue["eta_s"] == pytest.approx(2 / queue["per_s"])
    shown = shell.overpaint("queues").out.splitlines()
    assert shown[0].split("  ")[0] == "MODEL"
    assert shown[1].split()[:2] == ["tiny", "2"]


def test_queues_of_a_farm_without_workers_and_jobs_says_so(shell: Shell) -> None:
    result = shell.overpaint("queues")
    assert (result.code, result.out) == (0, "")
    assert "no job waits" in result.err


def test_why_tells_the_place_and_what_each_worker_does(shell: Shell, farm: Farm, hand: Hand) -> None:
    first, second = (farm.submit(job(), folder=shell.folder) for _ in range(2))
    (told,) = shell.overpaint("why", second.id, "--json").lines
    assert (told["reason"], told["ahead"], told["state"]) == ("behind", 1, "queued")
    assert [(worker["worker"], worker["can"]) for worker in told["workers"]] == [("hand@here", True)]
    shown = shell.overpaint("why", second.id).out
    assert "before it in the queue of model tiny: 1 job" in shown
    assert "hand@here" in shown
    hand.render(first.id)
    assert shell.overpaint("why", first.id, "--json").lines[0]["reason"] == "ended"
    farm.ledger.retire(hand.id)
    assert "start one with: overpaint-worker" in shell.overpaint("why", second.id).out


def test_why_of_a_job_that_is_not_there_fails(shell: Shell, farm: Farm) -> None:
    result = shell.overpaint("why", "nobody")
    assert (result.code, result.out) == (2, "")
    assert "there is no job nobody" in result.err


def test_metrics_are_served_until_the_command_is_stopped(shell: Shell, hand: Hand) -> None:
    process = shell.start("metrics", "--port", "0", "--json")
    try:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        with urllib.request.urlopen(address, timeout=10) as reply:  # noqa: S310  # our own
            text = reply.read().decode()
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=10)
    assert process.returncode == 0, said
    assert 'overpaint_workers_serving{model="tiny"} 1.0' in text
    assert 'overpaint_queue_depth{model="tiny"} 0.0' in text


def test_metrics_can_be_printed_once_also_without_redis(shell: Shell, bare: Shell, hand: Hand) -> None:
    assert "overpaint_ledger_up 1.0" in shell.overpaint("metrics", "--once").out
    away = bare.overpaint("metrics", "--once", "--redis-url", "redis://127.0.0.1:1/0")
    assert (away.code, away.err) == (0, "")
    assert "overpaint_ledger_up 0.0" in away.out


def test_gc_spares_what_is_young(shell: Shell, farm: Farm, hand: Hand) -> None:
    farm.store.put_input("default", b"orphan")
    result = shell.overpaint("gc", "--json")
    assert (result.code, result.out) == (0, "")
    assert "deleted 0" in result.err
    assert shell.overpaint("gc", "--older-than", "1").code == 2


def test_gc_finds_lost_attempts_and_unnamed_inputs_only(
    shell: Shell, farm: Farm, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = farm.submit(shell.folder / "job.json")
    lost = hand.claim(submitted.id).token
    farm.store.put_result(submitted.id, lost, "image.png", b"half", "image/png")
    hand.crash(submitted.id, lost)
    kept = hand.render(submitted.id)
    orphan = farm.store.put_input("default", b"orphan")
    farm.store.put_result("expired", 3, "image.png", b"x", "image/png")

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # noqa: ARG003
            return datetime.now(UTC) + timedelta(hours=25)

    monkeypatch.setattr(garbage, "datetime", Tomorrow)
    found = list(garbage.find(farm.ledger, farm.store))
    assert {each.name for each in found} == {f"results/{submitted.id}/{lost}/", f"inputs/default/{orphan}"}
    expired = list(garbage.find(farm.ledger, farm.store, expired_results=True))
    assert {each.name for each in expired} - {each.name for each in found} == {"results/expired/3/"}
    assert all(garbage.delete(farm.store, each) for each in found)
    assert not farm.store.has_input("default", orphan)
    assert [a.token for a in farm.store.attempts() if a.job_id == submitted.id] == [kept]
    assert submitted.image().size == (64, 48)


def test_gc_spares_an_input_that_was_written_anew_since_it_was_listed(farm: Farm, shell: Shell) -> None:
    sha = farm.store.put_input("default", b"orphan")
    (stored,) = farm.store.inputs()
    before = stored.modified - timedelta(seconds=5)
    assert not farm.store.delete_input("default", sha, unmodified_since=before)
    assert farm.store.delete_input("default", sha, unmodified_since=stored.modified)


def test_version_is_printed(bare: Shell) -> None:
    assert bare.overpaint("version").out == f"overpaint {__version__}\n"


# Failing


def test_a_farm_that_does_not_answer_is_exit_3_and_one_line(bare: Shell) -> None:
    url = f"redis://:hidden-word@127.0.0.1:{free_ports(1)[0]}/0"
    result = bare.overpaint("--redis-url", url, "jobs")
    assert (result.code, result.out, len(result.err.splitlines())) == (3, "", 1)
    for way in ("overpaint up", "--config", "OVERPAINT_REDIS_URL"):
        assert way in result.err
    assert "hidden-word" not in result.err
    told = bare.overpaint("jobs", "--redis-url", url, "--json")
    assert (told.code, json.loads(told.err)["error"]["code"]) == (3, "ledger_unreachable")


def test_a_misspelt_variable_is_noted_once(shell: Shell, hand: Hand) -> None:
    misspelt = Shell(shell.folder, shell.env | {"OVERPAINT_REDIS_URI": "redis://:hunter2@127.0.0.1:1/0"})
    result = misspelt.overpaint("validate", "job.json", "--farm")
    said = "OVERPAINT_REDIS_URI is no setting and has no effect. Did you mean OVERPAINT_REDIS_URL?"
    assert (result.code, result.err) == (0, f"overpaint: note: {said}\n")


def test_a_wrong_setting_is_exit_2_and_names_where_it_stands(bare: Shell) -> None:
    result = bare.overpaint("jobs", "--redis-url", "nonsense")
    assert result.code == 2
    assert "redis_url" in result.err
    told = Shell(bare.folder, bare.env | {"OVERPAINT_REDIS_URL": "nonsense"}).overpaint("jobs")
    assert (told.code, "OVERPAINT_REDIS_URL" in told.err) == (2, True)


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["submit"],
        ["submit", "job.json", "--seeds", "8..1"],
        ["submit", "job.json", "--set", "prompt"],
        ["submit", "job.json", "--out", "x"],
        ["submit", "job.json", "--label", "x"],
        ["submit", "nowhere/*.json"],
        ["status"],
        ["jobs", "--state", "lost"],
        ["get", "x", "--expires", "0"],
        ["gc", "--nonsense"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_exit_2_in_words_and_in_json(shell: Shell, argv: list[str]) -> None:
    shown = shell.overpaint(*argv)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("overpaint: ")
    assert "Traceback" not in shown.err
    told = shell.overpaint(*argv, "--json")
    assert told.code == 2
    assert json.loads(told.err)["error"]["message"]
