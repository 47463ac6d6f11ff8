"""The commands that submit and follow jobs, as typed, on real services, with a worker worked by hand."""

import json
import re
import signal
import socket
import threading
import urllib.request
from pathlib import Path

import pytest

from overpaint_producer.client import Farm
from overpaint_shared.errors import MaskError
from overpaint_shared.ledger import JobState
from tests.acceptance.commands import Shell, environment
from tests.integration.hand import Hand, job, png, spec_of
from tests.waiting import wait_until


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


def test_a_command_that_is_almost_one_is_told_with_the_nearest(tmp_path: Path) -> None:
    result = Shell(tmp_path, environment()).overpaint("sumbit", "job.json")
    assert (result.code, result.out) == (2, "")
    assert "No such command 'sumbit'. Did you mean submit?" in result.err


def test_a_folder_whose_farm_has_stopped_says_how_to_start_it(tmp_path: Path) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 6379)) == 0:
            pytest.skip("a Redis of somebody's listens at the default address")
    shell = Shell(tmp_path, environment() | {"HOME": str(tmp_path)})
    told = "the farm of this folder is not running"
    assert told not in shell.overpaint("jobs").err
    (tmp_path / "overpaint-data").mkdir()
    result = shell.overpaint("jobs")
    assert result.code == 3
    assert told in result.err
    assert "./up" in result.err
    assert told not in shell.overpaint("jobs", "--redis-url", "redis://127.0.0.1:1/0").err
