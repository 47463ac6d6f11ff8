"""The library against real Redis and S3; the worker is worked by hand."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from overpaint_producer import follow as follow_module
from overpaint_producer import submitting
from overpaint_producer.client import Farm, Job
from overpaint_producer.services import free_ports, start_redis
from overpaint_producer.submitting import Options, draft_of
from overpaint_shared.errors import (
    InputError,
    JobError,
    LedgerUnreachable,
    MaskError,
    OverpaintError,
    SettingsError,
    SpecError,
    StoreFull,
    StoreMissing,
    UnknownJob,
)
from overpaint_shared.job import parse_job
from overpaint_shared.ledger import (
    Done,
    Event,
    InputsGone,
    JobState,
    PartlySubmitted,
    QuotaExceeded,
    SubmitConflict,
)
from overpaint_shared.ledger.scripts import BURST_S, CONDEMNED_S
from overpaint_shared.queues import queue_name
from overpaint_shared.settings import Settings
from tests.integration.hand import Hand, job, png, spec_of, working

PHOTO = png()
SHA = hashlib.sha256(PHOTO).hexdigest()


@pytest.fixture
def farm(farm_settings: Settings) -> Iterator[Farm]:
    with Farm.connect(farm_settings) as farm:
        yield farm


@pytest.fixture
def hand(farm: Farm) -> Iterator[Hand]:
    with working(farm) as hand:
        yield hand


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a photo in it."""
    (tmp_path / "photo.png").write_bytes(PHOTO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Following(threading.Thread):
    """Follows jobs in a thread of its own and keeps what it hears."""

    def __init__(self, events: Iterator[Event]) -> None:
        super().__init__(daemon=True)
        self.events: list[Event] = []
        self._heard = threading.Condition()
        self._source = events
        self.start()

    def run(self) -> None:
        for event in self._source:
            with self._heard:
                self.events.append(event)
                self._heard.notify_all()

    def wait_for(self, state: JobState, step: int | None = None) -> None:
        def there() -> bool:
            return any(event.state is state and step in (None, event.step) for event in self.events)

        with self._heard:
            assert self._heard.wait_for(there, 20), self.events


# Submitting


def test_a_job_goes_from_a_dict_to_a_picture(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    hand.render(submitted.id)
    record = submitted.wait(10)
    assert record.state is JobState.DONE
    assert submitted.image().size == (64, 48)
    assert submitted.files()["receipt.json"] == b"{}"
    assert sorted(path.name for path in submitted.save(folder / "out")) == ["image.png", "receipt.json"]
    assert (folder / "out" / "image.png").read_bytes() == PHOTO


def test_a_submit_uploads_the_picture_under_its_owner_and_hash(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    assert spec_of(farm, submitted.id)["source"]["image"] == f"sha256:{SHA}"
    assert farm.store.get_input("default", SHA, 10**6) == PHOTO


def test_a_submit_publishes_one_message_with_readable_arguments(
    farm: Farm, hand: Hand, folder: Path, redis_client: redis.Redis
) -> None:
    submitted = farm.submit(job())
    lists = [key for key in redis_client.keys(f"{queue_name('tiny')}*") if redis_client.type(key) == b"list"]
    (message,) = [item for key in lists for item in redis_client.lrange(key, 0, -1)]
    assert submitted.id.encode() in message
    assert b"tiny img2img 64x48 denoise 0.6 seed 7" in message


def test_pictures_are_looked_for_from_the_job_files_folder(farm: Farm, hand: Hand, tmp_path: Path) -> None:
    (tmp_path / "shots").mkdir()
    (tmp_path / "photo.png").write_bytes(PHOTO)
    path = tmp_path / "shots" / "job.json"
    path.write_text(parse_job(job(source={"image": "../photo.png"})).to_json())
    assert spec_of(farm, farm.submit(path).id)["source"]["image"] == f"sha256:{SHA}"


def test_all_pictures_of_a_job_are_moved(farm: Farm, hand: Hand, folder: Path) -> None:
    (folder / "mask.png").write_bytes(png(colour="white"))
    spec = job(mask={"from": "image", "image": "mask.png"}, method={"kind": "latent_noise_mask"})
    stored = spec_of(farm, farm.submit(spec).id)
    assert stored["mask"]["image"] == "sha256:" + hashlib.sha256(png(colour="white")).hexdigest()


def test_many_jobs_read_and_send_a_shared_picture_once(
    farm: Farm, hand: Hand, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr(farm.store, "put_input", lambda _, data: sent.append(data))
    jobs = farm.submit_many([job(sampling={"seed": seed}) for seed in range(600)], group="many")
    assert sent == [PHOTO]
    assert len({submitted.id for submitted in jobs}) == 600
    assert len(farm.jobs(group="many", limit=1000)) == 600


def test_a_null_seed_is_drawn_and_stored(farm: Farm, hand: Hand, folder: Path) -> None:
    seeds = {
        spec_of(farm, farm.submit(job(sampling={"seed": None})).id)["sampling"]["seed"] for _ in range(4)
    }
    assert None not in seeds
    assert len(seeds) == 4


def test_a_token_gives_the_job_that_is_there_even_when_its_seed_was_drawn(
    farm: Farm, hand: Hand, folder: Path
) -> None:
    first = farm.submit(job(sampling={"seed": None}), token="once")
    again = farm.submit(job(sampling={"seed": None}), token="once")
    assert (first.created, again.created) == (True, False)
    assert again.id == first.id


def test_a_token_of_another_job_is_refused(farm: Farm, hand: Hand, folder: Path) -> None:
    farm.submit(job(), token="once")
    with pytest.raises(SubmitConflict, match="once"):
        farm.submit(job(prompt="another"), token="once")


def test_many_jobs_under_one_token_are_numbered_and_resumed(farm: Farm, hand: Hand, folder: Path) -> None:
    specs = [job(sampling={"seed": seed}) for seed in range(3)]
    first = farm.submit_many(specs[:2], token="night")
    again = farm.submit_many(specs, token="night")
    assert [each.created for each in again] == [False, False, True]
    assert [each.id for each in again[:2]] == [each.id for each in first]


def test_options_win_over_the_jobs_own_and_labels_are_added(farm: Farm, hand: Hand, folder: Path) -> None:
    spec = job(group="old", labels={"shot": "1"}, priority=5)
    record = farm.submit(spec, group="new", labels={"take": "2"}, priority=0).status()
    assert (record.group, dict(record.labels), record.priority) == ("new", {"shot": "1", "take": "2"}, 0)


def test_a_submit_stands_although_its_message_could_not_be_sent(
    farm: Farm, hand: Hand, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise LedgerUnreachable("away")

    monkeypatch.setattr("overpaint_shared.queues.publish", refuse)
    assert farm.submit(job()).status().state is JobState.QUEUED


def test_a_job_is_not_recorded_when_its_picture_could_not_be_stored(
    farm: Farm, hand: Hand, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(farm.store, "put_input", full)
    with pytest.raises(StoreFull):
        farm.submit(job())
    assert farm.jobs() == []


def test_without_a_worker_a_job_is_taken_with_a_warning(farm: Farm, folder: Path) -> None:
    submitted = farm.submit(job())
    assert "no worker" in str(submitted.warnings[0])
    assert submitted.status().state is JobState.QUEUED


# Refusals


def test_a_model_that_no_worker_has_is_refused_with_the_nearest_name(
    farm: Farm, hand: Hand, folder: Path
) -> None:
    with pytest.raises(SpecError, match="Did you mean tiny"):
        farm.submit(job(model="tinny"))
    assert farm.jobs() == []


def test_a_file_that_is_no_picture_is_never_uploaded(farm: Farm, hand: Hand) -> None:
    with pytest.raises(InputError, match="/etc/passwd is not a picture, so it was not uploaded") as caught:
        farm.submit(job(source={"image": "/etc/passwd"}))
    assert caught.value.field == "source.image"
    assert list(farm.store.inputs()) == []
    assert farm.jobs() == []


def test_a_picture_with_too_many_pixels_is_refused_undecoded(farm_settings: Settings, folder: Path) -> None:
    with Farm.connect(farm_settings.model_copy(update={"max_pixels": 64 * 47})) as farm:
        with pytest.raises(InputError, match="64 x 48 pixels"):
            farm.submit(job())
        assert list(farm.store.inputs()) == []


def test_a_picture_with_too_many_bytes_is_refused_unread(farm_settings: Settings, folder: Path) -> None:
    limit = farm_settings.model_copy(update={"max_input_bytes": len(PHOTO) - 1})
    with Farm.connect(limit) as farm, pytest.raises(InputError, match=f"{len(PHOTO)} bytes"):
        farm.submit(job())


def test_a_mask_of_another_size_is_refused_before_anything_is_sent(
    farm: Farm, hand: Hand, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mask.png").write_bytes(png(size=(32, 48), colour="white"))
    monkeypatch.setattr(farm.store, "put_input", lambda *_: pytest.fail("a picture was sent"))
    wrong = job(mask={"from": "image", "image": "mask.png"})
    for call in (farm.submit, farm.check):
        with pytest.raises(SpecError) as caught:
            call(wrong)
        [problem] = caught.value.problems
        assert problem.message == "the mask is 32 x 48 pixels, but the source is 64 x 48"
        assert (problem.path, problem.given, problem.allowed) == ("mask.image", "32 x 48", "64 x 48")
        assert '"canvas"' in str(caught.value.fix)
    assert farm.jobs() == []


def test_a_stored_picture_must_be_the_owners(farm: Farm, hand: Hand) -> None:
    farm.store.put_input("somebody", PHOTO)
    with pytest.raises(InputError, match="nothing is stored"):
        farm.submit(job(source={"image": f"sha256:{SHA}"}))
    farm.store.put_input("default", PHOTO)
    assert farm.submit(job(source={"image": f"sha256:{SHA}"})).created


def test_an_external_picture_must_be_in_an_allowed_bucket(farm: Farm, hand: Hand) -> None:
    with pytest.raises(InputError, match="may not read from bucket 'secrets'") as caught:
        farm.submit(job(source={"image": "s3://secrets/a.png"}))
    assert caught.value.field == "source.image"


def test_an_error_in_a_chunk_submits_nothing_of_it(farm: Farm, hand: Hand, folder: Path) -> None:
    with pytest.raises(SpecError):
        farm.submit_many([job(), job(model="tinny")])
    assert farm.jobs() == []


# Following


def test_progress_tells_every_state_and_step_until_the_end(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    following = Following(submitted.progress())
    following.wait_for(JobState.QUEUED)
    token = hand.claim(submitted.id).token
    for step in (1, 2, 3):
        hand.step(submitted.id, token, step)
        following.wait_for(JobState.RUNNING, step)
    hand.commit(submitted.id, token)
    following.join(10)
    assert following.events[-1].state is JobState.DONE
    steps = [
        event.step
        for event in following.events
        if event.stage == "denoise" and event.state is JobState.RUNNING
    ]
    assert steps == sorted(set(steps))


def test_following_an_ended_job_tells_its_end(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    hand.render(submitted.id)
    assert [event.state for event in submitted.progress(5)] == [JobState.DONE]


def test_a_dropped_event_is_made_up_for_by_the_record(
    farm: Farm, hand: Hand, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another owner's channel is heard, so that no event ever comes: only looking helps."""
    monkeypatch.setattr(follow_module, "POLL_S", 0.05)
    submitted = farm.submit(job())
    following = Following(follow_module.follow(farm.ledger, "deaf", [submitted.id]))
    following.wait_for(JobState.QUEUED)
    hand.render(submitted.id)
    following.wait_for(JobState.DONE)


def test_waiting_ends_when_its_time_is_over(farm: Farm, hand: Hand, folder: Path) -> None:
    with pytest.raises(TimeoutError, match="1 of 1"):
        farm.submit(job()).wait(0.05)


def test_waiting_for_a_job_that_never_was_is_refused(farm: Farm) -> None:
    with pytest.raises(UnknownJob):
        list(farm.follow(["nobody"]))


def test_waiting_survives_a_redis_that_is_killed_and_comes_back(
    tmp_path: Path, farm_settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, missed = start_redis(tmp_path / "redis"), threading.Event()
    wait = follow_module._Outage.wait

    def noted(*args: Any) -> None:
        missed.set()
        wait(*args)

    monkeypatch.setattr(follow_module._Outage, "wait", noted)
    with Farm.connect(farm_settings.model_copy(update={"redis_url": service.url})) as farm:
        submitted = farm.submit(job())
        following = Following(submitted.progress(60))
        following.wait_for(JobState.QUEUED)
        service.kill()
        assert missed.wait(30)  # longer than the connection's own retries
        service = start_redis(service.dir, port=service.port)
        try:
            Hand(farm).render(submitted.id)
            following.wait_for(JobState.DONE)
        finally:
            service.kill()


def test_a_redis_that_stays_away_is_told_in_the_end(
    tmp_path: Path, farm_settings: Settings, folder: Path
) -> None:
    service = start_redis(tmp_path / "redis")
    with Farm.connect(farm_settings.model_copy(update={"redis_url": service.url})) as farm:
        submitted = farm.submit(job())
        service.kill()
        with pytest.raises(LedgerUnreachable):
            list(follow_module.follow(farm.ledger, "default", [submitted.id], patience_s=0.1))


def test_many_jobs_are_followed_together(farm: Farm, hand: Hand, folder: Path) -> None:
    jobs = farm.submit_many([job(sampling={"seed": seed}) for seed in range(40)])
    following = Following(farm.follow([each.id for each in jobs], 60))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda each: hand.render(each.id), jobs))
    following.join(30)
    ended = [event.job_id for event in following.events if event.state is JobState.DONE]
    assert sorted(ended) == sorted(each.id for each in jobs)


# Ends


def test_a_folder_that_cannot_be_written_is_told(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    hand.render(submitted.id)
    (folder / "file").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"cannot write .*Not a directory"):
        submitted.save(folder / "file" / "out")


def test_the_picture_of_a_failed_job_raises_the_jobs_own_error(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    hand.fail(submitted.id, MaskError("it is empty", field="mask", fix="paint it").to_json())
    with pytest.raises(MaskError, match="it is empty"):
        submitted.image()


def test_the_picture_of_a_cancelled_job_says_that_it_was_cancelled(
    farm: Farm, hand: Hand, folder: Path
) -> None:
    submitted = farm.submit(job())
    assert submitted.cancel() is JobState.CANCELLED
    with pytest.raises(JobError, match="cancelled"):
        submitted.files()


def test_a_running_job_is_cancelled_when_its_worker_says_so(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    token = hand.claim(submitted.id).token
    assert submitted.cancel() is JobState.CANCELLING
    assert hand.step(submitted.id, token, 2) == "cancel"
    hand.confirm_cancel(submitted.id, token)
    assert submitted.wait(5).state is JobState.CANCELLED


def test_cancelling_a_job_that_never_was_is_refused(farm: Farm) -> None:
    with pytest.raises(UnknownJob):
        Job(farm, "nobody").cancel()


def test_a_failed_job_can_be_replayed(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    hand.fail(submitted.id, JobError("once").to_json())
    submitted.replay()
    hand.render(submitted.id)
    assert submitted.wait(5).state is JobState.DONE


def test_a_job_that_waits_cannot_be_replayed(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    hand.render(submitted.id)
    with pytest.raises(OverpaintError, match="done"):
        submitted.replay()


def test_only_the_committed_attempts_files_are_shown(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    lost = hand.claim(submitted.id).token
    farm.store.put_result(submitted.id, lost, "image.png", b"of a lost attempt", "image/png")
    hand.crash(submitted.id, lost)
    hand.render(submitted.id)
    assert submitted.files()["image.png"] == PHOTO


def test_a_result_that_was_removed_is_told(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    farm.store.delete_attempt(submitted.id, hand.render(submitted.id))
    with pytest.raises(StoreMissing):
        submitted.image()


def test_a_hostile_file_name_cannot_leave_the_folder(farm: Farm, hand: Hand, folder: Path) -> None:
    submitted = farm.submit(job())
    token = hand.claim(submitted.id).token
    key = farm.store.put_result(submitted.id, token, "image.png", PHOTO, "image/png")
    farm.ledger.finish(submitted.id, token, Done({"files": {"../../escaped.png": key}}))
    (saved,) = submitted.save(folder / "a" / "b")
    assert saved == folder / "a" / "b" / "escaped.png"


def test_a_check_says_what_a_submit_would(farm: Farm, hand: Hand) -> None:
    spec, warnings = farm.check(job())
    assert (spec.model, warnings) == ("tiny", ())
    with pytest.raises(SpecError):
        farm.check(job(model="tinny"))


def test_a_farm_that_does_not_answer_is_told(farm_settings: Settings) -> None:
    gone: Any = farm_settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_ports(1)[0]}/0"})
    with pytest.raises(LedgerUnreachable, match="does not answer"):
        Farm.connect(gone)


# Limits


def test_a_submit_that_is_too_fast_is_slowed_down_and_said_once(
    farm: Farm, hand: Hand, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    farm.ledger.set_limits(None, {"submits_per_s": 20})
    jobs = farm.submit_many([job() for _ in range(20 * BURST_S + 15)])
    assert len({each.id for each in jobs}) == 20 * BURST_S + 15
    assert [record.message for record in caplog.records].count(
        "submitting more slowly: owner default may submit 20 jobs a second"
    ) == 1


def test_a_submit_beyond_the_limit_of_what_waits_is_refused_at_once_with_the_rest_submitted(
    farm: Farm, hand: Hand, folder: Path
) -> None:
    farm.ledger.set_limits(farm.settings.owner, {"max_queued": 2})
    with pytest.raises(QuotaExceeded, match="has 2 jobs waiting"):
        farm.submit_many([job() for _ in range(3)])
    assert len(farm.jobs()) == 2
    assert farm.ledger.quota(farm.settings.owner).queued == 2


def test_a_deadline_goes_from_the_job_file_to_the_record_and_is_told(farm: Farm, folder: Path) -> None:
    submitted = farm.submit(job(deadline_s=90))
    record = submitted.status()
    assert record.deadline == pytest.approx(record.created + 90, abs=0.01)
    assert "it fails in 1:" in farm.why(submitted.id).text


def submitting_many(
    farm: Farm, specs: list[dict[str, Any]], **options: Any
) -> tuple[list[str], PartlySubmitted]:
    """Submit jobs until an error: the ids that were told, and the error."""
    told: list[str] = []
    drafts = (draft for spec in specs for draft in draft_of(spec, None))
    submitted = farm.submit_drafts(drafts, Options(**options), many=True)
    with pytest.raises(PartlySubmitted) as caught:
        told.extend(each.id for _, each in submitted)
    return told, caught.value


def test_the_jobs_that_a_limit_left_room_for_are_told_before_the_error(
    farm: Farm, hand: Hand, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "CHUNK", 3)
    farm.ledger.set_limits(farm.settings.owner, {"max_queued": 5})
    told, error = submitting_many(farm, [job() for _ in range(9)])
    assert len(told) == 5
    assert set(told) == {record.id for record in farm.jobs()}
    assert isinstance(error, QuotaExceeded)
    assert [answer.id for answer in error.submitted] == told
    assert "may have 5; 5 jobs were submitted, the rest was not (" in str(error)
    assert "without a token the others would run twice" in str(error)


def test_answers_of_before_a_wait_are_told_when_the_wait_ends_in_an_error(
    farm: Farm, hand: Hand, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "QUOTA_PATIENCE_S", 0.0)
    farm.ledger.set_limits(None, {"submits_per_s": 1})
    told, error = submitting_many(farm, [job() for _ in range(BURST_S + 3)], token="t")
    assert set(told) == {record.id for record in farm.jobs()}
    assert len(told) >= BURST_S
    assert "run twice" not in str(error), "a token makes repeating safe"


def test_the_jobs_beside_a_token_of_another_job_are_told(farm: Farm, hand: Hand, folder: Path) -> None:
    farm.submit(job(), token="t-2")
    told, error = submitting_many(farm, [job(), job(sampling={"seed": 8, "steps": 4}), job()], token="t")
    assert isinstance(error, SubmitConflict)
    assert [answer.id for answer in error.submitted] == told
    assert {farm.ledger.job(each).submit_token for each in told} == {"t-1", "t-3"}  # type: ignore[union-attr]


def test_the_jobs_beside_one_whose_picture_stays_condemned_are_told(
    farm: Farm, hand: Hand, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "LOOK_AGAIN_S", (0.0,))
    sha256 = farm.store.put_input("default", png(colour="blue"))
    assert farm.ledger.input_collector().condemn("default", sha256)[0] == "condemned"
    told, error = submitting_many(farm, [job(), job(source={"image": f"sha256:{sha256}"}), job()])
    assert isinstance(error, InputsGone)
    assert [answer.id for answer in error.submitted] == told == [farm.job(each).id for each in told]
    assert len(told) == 2


def test_looking_again_lasts_longer_than_a_dead_collectors_deletion() -> None:
    assert sum(submitting.LOOK_AGAIN_S) > CONDEMNED_S
