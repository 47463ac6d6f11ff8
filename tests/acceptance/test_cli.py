"""The producer's commands as typed, on real services, with a worker worked by hand."""

import json
import re
import signal
import threading
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

from overpaint_producer import garbage
from overpaint_producer.client import Farm
from overpaint_producer.services import free_ports
from overpaint_shared import __version__
from overpaint_shared.errors import MaskError
from overpaint_shared.ledger import JobState
from overpaint_shared.settings import Settings
from tests.acceptance.commands import Shell, environment
from tests.integration.hand import Hand, job, png, spec_of, working
from tests.waiting import wait_until


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


def render_all(hand: Hand, count: int) -> threading.Thread:
    """Render the next `count` jobs as they are submitted."""

    def work() -> None:
        done: set[str] = set()
        while len(done) < count:
            queued = wait_until(lambda: hand.farm.jobs(state=JobState.QUEUED, limit=1000), 60)
            for record in queued:
                hand.render(record.id)
                done.add(record.id)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


# submit


def test_submit_prints_one_id_a_line(shell: Shell, farm: Farm, hand: Hand) -> None:
    (shell.folder / "other.json").write_text(json.dumps(job(prompt="another")))
    result = shell.overpaint("submit", "job.json", "other.json")
    assert (result.code, result.err) == (0, "")
    assert [farm.job(job_id).status().state for job_id in result.out.split()] == [JobState.QUEUED] * 2


def test_submit_expands_patterns_that_the_shell_left(shell: Shell, hand: Hand) -> None:
    (shell.folder / "jobs").mkdir()
    for number in range(3):
        (shell.folder / "jobs" / f"{number}.json").write_text(
            json.dumps(job(source={"image": "../photo.png"}))
        )
    assert len(shell.overpaint("submit", "jobs/*.json").out.split()) == 3


def test_submit_waits_fetches_and_reports_in_json(shell: Shell, hand: Hand) -> None:
    worker = render_all(hand, 1)
    result = shell.overpaint("submit", "job.json", "--wait", "--out", "pictures", "--json")
    worker.join(10)
    assert result.code == 0, result.err
    (record,) = result.lines
    assert (record["state"], record["saved"]) == ("done", ["pictures/image.png", "pictures/receipt.json"])
    assert (shell.folder / "pictures" / "image.png").read_bytes() == png()
    assert "done" in result.err


def test_submit_of_many_fetches_a_folder_each(shell: Shell, hand: Hand) -> None:
    worker = render_all(hand, 3)
    result = shell.overpaint("submit", "job.json", "--seeds", "1..3", "--wait", "--out", "pictures")
    worker.join(10)
    assert result.code == 0, result.err
    ids = result.out.split()
    assert sorted(path.name for path in (shell.folder / "pictures").iterdir()) == sorted(ids)
    assert all((shell.folder / "pictures" / job_id / "image.png").exists() for job_id in ids)


def test_seeds_and_assignments_make_every_combination_in_one_group(
    shell: Shell, farm: Farm, hand: Hand
) -> None:
    argv = [
        "--seeds",
        "1..2,9",
        "--set",
        "prompt=a hat",
        "--set",
        "prompt=a cat",
        "--set",
        "sampling.denoise=0.5",
    ]
    result = shell.overpaint("submit", "job.json", *argv, "--label", "shot=12", "--priority", "2")
    assert result.code == 0, result.err
    ids = result.out.split()
    specs = [spec_of(farm, job_id) for job_id in ids]
    made = [(spec["prompt"], spec["sampling"]["seed"], spec["sampling"]["denoise"]) for spec in specs]
    assert made == [(prompt, seed, 0.5) for prompt in ("a hat", "a cat") for seed in (1, 2, 9)]
    records = [farm.job(job_id).status() for job_id in ids]
    assert len({record.group for record in records}) == 1
    assert records[0].group is not None
    assert re.fullmatch(r"job-[0-9a-f]{6}", records[0].group)
    assert {(record.priority, record.labels["shot"]) for record in records} == {(2, "12")}


def test_json_lines_come_on_standard_input(shell: Shell, farm: Farm, hand: Hand) -> None:
    lines = "\n".join(json.dumps(job(sampling={"seed": seed})) for seed in range(5))
    result = shell.overpaint("submit", "-", "--group", "night", "--json", stdin=lines + "\n\n")
    assert result.code == 0, result.err
    assert [line["created"] for line in result.lines] == [True] * 5
    assert result.lines[2]["where"] == "standard input, line 3"
    assert len(farm.jobs(group="night")) == 5


def test_one_job_over_many_lines_comes_on_standard_input(shell: Shell, hand: Hand) -> None:
    result = shell.overpaint("submit", "-", stdin=json.dumps(job(), indent=2))
    assert (result.code, len(result.out.split())) == (0, 1), result.err


def test_a_token_makes_submitting_again_safe(shell: Shell, farm: Farm, hand: Hand) -> None:
    argv = ["submit", "job.json", "--seeds", "1..3", "--token", "night"]
    first, again = shell.overpaint(*argv), shell.overpaint(*argv)
    assert (first.code, again.code) == (0, 0), again.err
    assert first.out == again.out
    assert len(farm.jobs()) == 3


def test_a_token_for_another_job_is_refused(shell: Shell, hand: Hand) -> None:
    shell.overpaint("submit", "job.json", "--token", "once")
    result = shell.overpaint("submit", "job.json", "--set", "prompt=other", "--token", "once")
    assert result.code == 2
    assert "once" in result.err


def test_one_wrong_file_stops_all_before_anything_is_submitted(shell: Shell, farm: Farm, hand: Hand) -> None:
    (shell.folder / "wrong.json").write_text(json.dumps(job(prioritty=1)))
    result = shell.overpaint("submit", "job.json", "wrong.json")
    assert (result.code, result.out) == (2, "")
    assert "wrong.json" in result.err
    assert "Did you mean priority?" in result.err
    assert farm.jobs() == []


def test_a_file_that_is_no_picture_is_not_uploaded(shell: Shell, farm: Farm, hand: Hand) -> None:
    result = shell.overpaint("submit", "job.json", "--set", "source.image=/etc/passwd")
    assert result.code == 1
    assert "not a picture, so it was not uploaded" in result.err
    assert "source.image: job.json: " in result.err
    assert len(result.err.splitlines()) == 1
    assert list(farm.store.inputs()) == []


def test_a_failed_job_makes_submit_wait_exit_1_and_say_why(shell: Shell, farm: Farm, hand: Hand) -> None:
    def fail() -> None:
        (record,) = wait_until(lambda: farm.jobs(state=JobState.QUEUED), 60)
        hand.fail(record.id, MaskError("it is empty", field="mask", fix="paint it").to_json())

    worker = threading.Thread(target=fail, daemon=True)
    worker.start()
    result = shell.overpaint("submit", "job.json", "--wait")
    worker.join(10)
    assert result.code == 1
    assert "failed: mask: it is empty (paint it)" in result.err


def test_interrupting_a_wait_says_how_to_watch_again(shell: Shell, farm: Farm, hand: Hand) -> None:
    process = shell.start("submit", "job.json", "--wait")
    (record,) = wait_until(lambda: farm.jobs(state=JobState.QUEUED), 60)
    assert process.stderr is not None
    assert "queued" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"overpaint watch {record.id}" in err
    assert "Traceback" not in err
    assert farm.job(record.id).status().state is JobState.QUEUED


# status, watch, get, cancel, jobs, replay


def test_status_shows_a_job_to_people_and_to_scripts(shell: Shell, farm: Farm, hand: Hand) -> None:
    submitted = farm.submit(shell.folder / "job.json", group="night")
    hand.render(submitted.id)
    shown = shell.overpaint("status", submitted.id)
    assert shown.code == 0
    assert f"{submitted.id}  done" in re.sub(" +", "  ", shown.out)
    assert "tiny img2img 64x48" in shown.out
    (record,) = shell.overpaint("status", "--group", "night", "--json").lines
    assert (record["id"], record["state"], record["spec"]["model"]) == (submitted.id, "done", "tiny")


def test_an_unknown_job_is_told_in_words_or_in_json(shell: Shell, hand: Hand) -> None:
    shown = shell.overpaint("status", "nobody")
    assert (shown.code, shown.out) == (2, "")
    assert "there is no job nobody" in shown.err
    told = shell.overpaint("status", "nobody", "--json")
    assert (told.code, told.out) == (2, "")
    assert json.loads(told.err)["error"]["code"] == "unknown_job"


def test_watch_prints_events_as_json_lines(shell: Shell, farm: Farm, hand: Hand) -> None:
    submitted = farm.submit(shell.folder / "job.json")
    process = shell.start("watch", submitted.id, "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["state"] == "queued"
    hand.render(submitted.id)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(out.splitlines()[-1])["state"] == "done"


def test_watch_says_plain_lines_where_there_is_no_terminal(shell: Shell, farm: Farm, hand: Hand) -> None:
    submitted = farm.submit(shell.folder / "job.json")
    process = shell.start("watch", submitted.id)
    assert process.stderr is not None
    assert process.stderr.readline() == f"{submitted.id} queued\n"
    token = hand.claim(submitted.id).token
    hand.step(submitted.id, token, 3)
    while (line := process.stderr.readline()) and "denoise" not in line:
        pass
    assert line == f"{submitted.id} running denoise 3/4\n"
    hand.commit(submitted.id, token)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", f"{submitted.id} done\n")


def test_get_fetches_files_and_prints_their_paths(shell: Shell, farm: Farm, hand: Hand) -> None:
    submitted = farm.submit(shell.folder / "job.json")
    hand.render(submitted.id)
    result = shell.overpaint("get", submitted.id, "--out", "here")
    assert (result.code, result.out.split()) == (0, ["here/image.png", "here/receipt.json"])
    assert (shell.folder / "here" / "image.png").read_bytes() == png()


def test_get_prints_links_that_open_without_a_key(shell: Shell, farm: Farm, hand: Hand) -> None:
    submitted = farm.submit(shell.folder / "job.json")
    hand.render(submitted.id)
    (told,) = shell.overpaint("get", submitted.id, "--links", "--json").lines
    with urllib.request.urlopen(told["links"]["image.png"]) as answer:  # noqa: S310 - our own server's address
        assert answer.read() == png()


def test_get_of_a_failed_job_ends_with_its_error(shell: Shell, farm: Farm, hand: Hand) -> None:
    submitted = farm.submit(shell.folder / "job.json")
    hand.fail(submitted.id, MaskError("it is empty", field="mask").to_json())
    result = shell.overpaint("get", submitted.id, "--json")
    assert result.code == 1
    assert json.loads(result.err)["error"]["code"] == "mask"


def test_get_and_replay_of_a_cancelled_job_say_how_to_submit_it_anew(
    shell: Shell, farm: Farm, hand: Hand
) -> None:
    submitted = farm.submit(shell.folder / "job.json")
    submitted.cancel()
    wanted = f"overpaint status {submitted.id} --json | jq .spec | overpaint submit -"
    for command in ("get", "replay"):
        refused = shell.overpaint(command, submitted.id)
        assert (refused.code, refused.out) == (1, "")
        assert "is cancelled" in refused.err
        assert wanted in refused.err
    spec = shell.overpaint("status", submitted.id, "--json").lines[0]["spec"]
    again = shell.overpaint("submit", "-", stdin=json.dumps(spec, indent=2))  # as jq would print it
    assert (again.code, again.err) == (0, "")
    assert again.out.strip() not in ("", submitted.id)


def test_replay_of_a_job_that_is_done_says_how_to_fetch_it(shell: Shell, farm: Farm, hand: Hand) -> None:
    submitted = farm.submit(shell.folder / "job.json")
    hand.render(submitted.id)
    refused = shell.overpaint("replay", submitted.id)
    assert (refused.code, refused.out) == (1, "")
    assert f"overpaint get {submitted.id}" in refused.err


def test_cancel_stops_a_whole_group(shell: Shell, farm: Farm, hand: Hand) -> None:
    jobs = farm.submit_many([shell.folder / "job.json"] * 3, group="night")
    token = hand.claim(jobs[0].id).token
    result = shell.overpaint("cancel", "--group", "night")
    assert result.code == 0
    said = dict(line.split() for line in result.out.splitlines())
    assert said == {jobs[0].id: "cancelling", jobs[1].id: "cancelled", jobs[2].id: "cancelled"}
    assert hand.step(jobs[0].id, token, 2) == "cancel"


def test_jobs_lists_and_filters(shell: Shell, farm: Farm, hand: Hand) -> None:
    done = farm.submit(shell.folder / "job.json", labels={"shot": "12"})
    waiting = farm.submit(shell.folder / "job.json", group="night")
    hand.render(done.id)
    listed = shell.overpaint("jobs").out.splitlines()
    assert listed[0].split() == ["ID", "STATE", "STEP", "AGE", "TITLE"]
    assert [line.split()[0] for line in listed[1:]] == [waiting.id, done.id]
    for argv, wanted in (
        (["--state", "done"], done.id),
        (["--group", "night"], waiting.id),
        (["--label", "shot=12"], done.id),
        (["--limit", "1"], waiting.id),
    ):
        assert [record["id"] for record in shell.overpaint("jobs", "--json", *argv).lines] == [wanted]
    nothing = shell.overpaint("jobs", "--model", "other")
    assert (nothing.code, nothing.out, nothing.err) == (0, "", "overpaint: no job matches\n")
    scripted = shell.overpaint("jobs", "--model", "other", "--json")
    assert (scripted.code, scripted.out, scripted.err) == (0, "", "")  # no line: no job


def test_jobs_of_a_new_farm_says_that_there_are_none(shell: Shell, hand: Hand) -> None:
    result = shell.overpaint("jobs")
    assert (result.code, result.out, result.err) == (0, "", "overpaint: there are no jobs yet\n")


def test_jobs_of_different_strength_can_be_told_apart(shell: Shell, farm: Farm, hand: Hand) -> None:
    shell.overpaint("submit", "job.json", "--set", "sampling.denoise=0.3", "--set", "sampling.denoise=0.85")
    titles = [record.title for record in farm.jobs()]
    assert titles == [f"tiny img2img 64x48 denoise {value} seed 7" for value in (0.85, 0.3)]


def test_replay_queues_a_failed_job_again(shell: Shell, farm: Farm, hand: Hand) -> None:
    submitted = farm.submit(shell.folder / "job.json")
    hand.fail(submitted.id, MaskError("once").to_json())
    assert shell.overpaint("replay", submitted.id).out == f"{submitted.id} queued\n"
    hand.render(submitted.id)
    again = shell.overpaint("replay", submitted.id)
    assert again.code != 0
    assert "only a failed or dead job" in again.err


# validate, schema, workers, gc, version


def test_validate_needs_no_farm(bare: Shell) -> None:
    Image.new("RGB", (64, 64)).save(bare.folder / "photo.png")
    result = bare.overpaint("validate", "job.json")
    assert (result.code, result.out, result.err) == (0, "job.json: ok\n", "")


def test_validate_notes_each_picture_that_submit_would_refuse(bare: Shell) -> None:
    (bare.folder / "text.png").write_text("no picture")
    mask = {"from": "image", "image": "text.png"}
    (bare.folder / "a.json").write_text(json.dumps(job(source={"image": "gone.png"}, mask=mask)))
    result = bare.overpaint("validate", "a.json")
    assert (result.code, result.out) == (0, "a.json: ok\n")
    assert "note: source.image: gone.png is not there" in result.err
    assert "note: mask.image: text.png is not there, or is no picture" in result.err
    assert str(bare.folder) in result.err


def test_validate_refuses_a_mask_of_another_size(bare: Shell) -> None:
    (bare.folder / "photo.png").write_bytes(png())
    (bare.folder / "mask.png").write_bytes(png(size=(32, 48)))
    mask = {"from": "image", "image": "mask.png"}
    (bare.folder / "job.json").write_text(json.dumps(job(mask=mask)))
    result = bare.overpaint("validate", "job.json")
    assert (result.code, result.out) == (2, "")
    assert "mask.image: the mask is 32 x 48 pixels, but the source is 64 x 48." in result.err


def test_validate_tells_all_problems_of_all_files(bare: Shell) -> None:
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
