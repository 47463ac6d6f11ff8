"""`overpaint gc` beside submits, uploads, replays and itself: an accepted job keeps its pictures."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, Self

import pytest
import redis

from overpaint_producer import garbage, submitting
from overpaint_producer.client import Farm
from overpaint_shared.errors import InputError, StoreMissing
from overpaint_shared.ledger import Failed, InputsGone, JobState, Ledger, Submission
from overpaint_shared.ledger import inputs as inputs_module
from overpaint_shared.settings import Settings
from overpaint_shared.store import StoredInput
from tests.integration.hand import Hand, job, png, working
from tests.waiting import wait_until

AT_ONCE = timedelta(seconds=-5)
"""S3 tells times in whole seconds."""
_pictures = count()


@pytest.fixture
def farm(farm_settings: Settings) -> Iterator[Farm]:
    with Farm.connect(farm_settings) as farm:
        yield farm


@pytest.fixture
def hand(farm: Farm) -> Iterator[Hand]:
    with working(farm) as hand:
        yield hand


def picture() -> bytes:
    """A picture that no test had before: uploads are told apart by their bytes."""
    return png() + f"padding {next(_pictures)}".encode()


def collect(farm: Farm) -> list[str]:
    """Run the collector once over everything, however young; what it deleted."""
    found = garbage.find(farm.ledger, farm.store, min_age=AT_ONCE)
    return [each.name for each in found if garbage.delete(farm.store, each)]


def named(sha256: str, **more: Any) -> dict[str, Any]:
    return job(source={"image": f"sha256:{sha256}"}) | more


def input_of(farm: Farm, job_id: str) -> bytes:
    """The picture, as a worker fetches it."""
    record = farm.ledger.job(job_id)
    assert record is not None
    (sha256,) = inputs_module.named_in(record.spec_json or "")
    return farm.store.get_input(record.owner, sha256, 1 << 20)


def between(
    monkeypatch: pytest.MonkeyPatch,
    where: type,
    method: str,
    then: Callable[[], object],
    *,
    before: bool = False,
) -> None:
    """Let `then` happen once, right after `method` of any object (or before it)."""
    original, done = getattr(where, method), threading.Event()

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = not done.is_set()
        done.set()
        if first and before:
            then()
        answer = original(self, *args, **kwargs)
        if first and not before:
            then()
        return answer

    monkeypatch.setattr(where, method, wrapped)


def test_a_picture_that_goes_between_the_look_and_the_record_is_told_before_the_job_is_accepted(
    farm: Farm, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = farm.store.put_input("default", picture())
    between(monkeypatch, type(farm.store), "has_input", lambda: collect(farm))
    with pytest.raises(InputError, match="nothing is stored as sha256:"):
        farm.submit(named(sha256))
    assert farm.jobs() == []


def test_a_file_whose_upload_goes_before_the_record_is_sent_again(
    farm: Farm, hand: Hand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(picture())
    gone: list[str] = []
    between(monkeypatch, Ledger, "submit", lambda: gone.extend(collect(farm)), before=True)
    submitted = farm.submit(job(), folder=tmp_path)
    assert len(gone) == 1
    assert input_of(farm, submitted.id) == (tmp_path / "photo.png").read_bytes()


def test_of_a_batch_only_the_jobs_without_their_picture_are_prepared_again(
    farm: Farm, hand: Hand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = farm.store.put_input("default", picture())
    farm.submit(named(kept))  # so that a record names it
    (tmp_path / "photo.png").write_bytes(picture())
    sizes: list[int] = []
    submit = Ledger.submit

    def counted(self: Ledger, items: list[Submission]) -> Any:
        sizes.append(len(items))
        return submit(self, items)

    monkeypatch.setattr(Ledger, "submit", counted)
    between(monkeypatch, Ledger, "submit", lambda: collect(farm), before=True)
    submitted = farm.submit_many([named(kept), job(), named(kept)], folder=tmp_path)
    assert sizes == [3, 1]
    assert len({each.id for each in submitted}) == 3
    pictures = [input_of(farm, each.id) for each in submitted]
    assert pictures[0] == pictures[2] != pictures[1] == (tmp_path / "photo.png").read_bytes()


def test_a_job_that_was_submitted_after_the_collector_looked_keeps_its_picture(
    farm: Farm, hand: Hand
) -> None:
    first, second = (farm.store.put_input("default", picture()) for _ in range(2))
    found = list(garbage.find(farm.ledger, farm.store, min_age=AT_ONCE))
    farm.submit(named(first))
    assert {each.name for each in found if garbage.delete(farm.store, each)} == {f"inputs/default/{second}"}


def test_many_jobs_that_come_after_the_collector_looked_keep_their_pictures(farm: Farm, hand: Hand) -> None:
    kept = farm.store.put_input("default", picture())
    unneeded = [farm.store.put_input("default", picture()) for _ in range(3)]
    found = list(garbage.find(farm.ledger, farm.store, min_age=AT_ONCE))
    farm.submit_many([named(kept)] * 600)  # more than a script reads, and more than a page
    deleted = {each.name for each in found if garbage.delete(farm.store, each)}
    assert deleted == {f"inputs/default/{each}" for each in unneeded}


def test_an_input_of_another_owners_job_is_no_reason_to_keep_it(farm: Farm, hand: Hand) -> None:
    data = picture()
    farm.submit(named(farm.store.put_input("default", data)))
    other = farm.store.put_input("ann", data)
    assert collect(farm) == [f"inputs/ann/{other}"]


def test_a_failed_job_that_can_be_replayed_keeps_its_picture(farm: Farm, hand: Hand) -> None:
    submitted = farm.submit(named(farm.store.put_input("default", picture())))
    hand.fail(submitted.id, {"code": "job", "message": "bad luck"})
    assert collect(farm) == []
    submitted.replay()
    hand.claim(submitted.id)
    assert input_of(farm, submitted.id)


def test_two_collectors_do_not_delete_the_same_input(farm: Farm, hand: Hand) -> None:
    farm.store.put_input("default", picture())
    one, two = (next(garbage.find(farm.ledger, farm.store, min_age=AT_ONCE)) for _ in range(2))
    assert isinstance(one.item, StoredInput)
    verdict, ends = one.collector.condemn(one.item.owner, one.item.sha256)
    assert verdict == "condemned"
    assert not garbage.delete(farm.store, two)
    one.collector.deleted(one.item.owner, one.item.sha256, ends)
    assert garbage.delete(farm.store, two)


def test_while_an_input_is_being_deleted_no_job_that_names_it_is_accepted(
    farm: Farm, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor after its collector died: until the deletion that it may have sent is no longer valid."""
    monkeypatch.setattr(submitting, "LOOK_AGAIN_S", (0.0, 0.0))
    sha256 = farm.store.put_input("default", picture())
    (found,) = garbage.find(farm.ledger, farm.store, min_age=AT_ONCE)
    _, ends = found.collector.condemn("default", sha256)
    with pytest.raises(InputsGone, match=f"sha256:{sha256} is being deleted"):
        farm.submit(named(sha256))
    assert farm.jobs() == []
    found.collector.deleted("default", sha256, ends)
    assert input_of(farm, farm.submit(named(sha256)).id)


def test_a_deletion_that_comes_late_is_refused_by_the_store(
    farm: Farm, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the collector was stopped, or the server hung, between signing and deleting."""
    monkeypatch.setattr(garbage, "SIGNED_S", 1)
    sha256 = farm.store.put_input("default", picture())
    (found,) = garbage.find(farm.ledger, farm.store, min_age=AT_ONCE)
    between(monkeypatch, type(found.collector), "condemn", lambda: threading.Event().wait(2.1))
    assert not garbage.delete(farm.store, found)
    assert farm.store.has_input("default", sha256)
    monkeypatch.setattr(submitting, "LOOK_AGAIN_S", (0.02, 0.02))
    assert input_of(farm, farm.submit(named(sha256)).id), "the deletion has ended, so the picture can be used"


def test_a_collector_gives_up_on_an_owner_who_submits_faster_than_it_reads(
    farm: Farm, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    unneeded = farm.store.put_input("default", picture())
    (found,) = garbage.find(farm.ledger, farm.store, min_age=AT_ONCE)
    monkeypatch.setattr(inputs_module, "_UNREAD", 5)
    monkeypatch.setattr(inputs_module, "_OVERLAP_S", 600.0)  # as if all were submitted in this second
    farm.submit_many([named(farm.store.put_input("default", picture()))] * 6)
    assert not garbage.delete(farm.store, found)
    assert farm.store.has_input("default", unneeded)


def test_a_damaged_record_keeps_its_files_and_the_collector_goes_on(
    farm: Farm, hand: Hand, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    kept = farm.store.put_input("default", picture())
    odd, typeless, failed = farm.submit_many([named(kept)] * 3)
    for each in (odd, typeless, failed):
        token = hand.claim(each.id).token
        farm.store.put_result(each.id, token, "image.png", b"x", "image/png")
    assert farm.ledger.finish(failed.id, token, Failed({"code": "job"})).accepted
    redis_client.hset(f"op:job:{odd.id}", "created", "never")
    redis_client.delete(f"op:job:{typeless.id}")
    redis_client.set(f"op:job:{typeless.id}", "no hash")
    unneeded = farm.store.put_input("default", picture())
    assert set(collect(farm)) == {f"results/{failed.id}/{token}/", f"inputs/default/{unneeded}"}
    told = [record.message for record in caplog.records if "passed over" in record.message]
    assert len(told) == 2
    assert all(each.id in " ".join(told) for each in (odd, typeless))


def test_a_damaged_index_of_one_owner_keeps_all_their_inputs_and_no_others(
    farm: Farm, hand: Hand, redis_client: redis.Redis
) -> None:
    for _ in range(2):
        farm.store.put_input("ann", picture())
    redis_client.set("op:owner:ann", "no index")
    unneeded = farm.store.put_input("default", picture())
    assert collect(farm) == [f"inputs/default/{unneeded}"]


def test_files_of_strangers_in_the_bucket_do_not_stop_the_collector(farm: Farm) -> None:
    strange = ["results/a b/1/x", "results/job/01/x", "results/job/\u0661/x", "results/job/0/x", "results/x"]
    for key in strange:
        farm.store._s3.put_object(Bucket=farm.store.settings.bucket, Key=key, Body=b"x")
    farm.store.put_result("job", 1, "image.png", b"x", "image/png")
    found = garbage.find(farm.ledger, farm.store, min_age=AT_ONCE, expired_results=True)
    assert [each.name for each in found if garbage.delete(farm.store, each)] == ["results/job/1/"]


def test_a_producer_that_looked_long_ago_must_look_again(farm: Farm, hand: Hand) -> None:
    sha256 = farm.store.put_input("default", picture())
    late = Submission(
        id="late",
        owner="default",
        spec_json=f'{{"image":"sha256:{sha256}"}}',
        model="tiny",
        checked=farm.ledger.now() - 8000,
    )
    with pytest.raises(InputsGone) as caught:
        farm.ledger.submit([late])
    assert caught.value.gone == {"late": {sha256}}
    assert farm.ledger.job("late") is None


class Beside:
    """Collectors that run without a pause until the block ends."""

    def __init__(self, farm_settings: Settings, number: int) -> None:
        self._farms = [Farm.connect(farm_settings) for _ in range(number)]
        self._stop = threading.Event()
        self.deleted: list[str] = []

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(len(self._farms))
        self._runs = [self._pool.submit(self._collect, each) for each in self._farms]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for each in self._runs:
            each.result()
        for farm in self._farms:
            farm.close()

    def _collect(self, farm: Farm) -> None:
        while not self._stop.is_set():
            self.deleted += collect(farm)


def test_collectors_beside_hundreds_of_submits_take_no_accepted_jobs_picture(
    farm_settings: Settings, hand: Hand, tmp_path: Path
) -> None:
    """Stored pictures, new ones and replays; a refused job is told, an accepted one has its picture."""
    accepted: list[str] = []
    refused: list[str] = []

    def stored(farm: Farm) -> None:
        for _ in range(60):
            sha256 = farm.store.put_input("default", picture())
            try:
                accepted.append(farm.submit(named(sha256)).id)
            except InputError as error:
                assert "nothing is stored as" in error.message  # noqa: PT017 - either way of ending is right
                refused.append(sha256)

    def uploaded(farm: Farm, folder: Path) -> None:
        folder.mkdir()
        for _ in range(20):
            (folder / "photo.png").write_bytes(picture())
            accepted.extend(each.id for each in farm.submit_many([job()] * 2, folder=folder))

    def replayed(farm: Farm) -> None:
        for _ in range(20):
            again = farm.submit(job(), folder=tmp_path)
            hand.fail(again.id, {"code": "job", "message": "bad luck"})
            again.replay()
            accepted.append(again.id)

    (tmp_path / "photo.png").write_bytes(png())
    with (
        Beside(farm_settings, 2) as beside,
        ThreadPoolExecutor(5) as pool,
        Farm.connect(farm_settings) as farm,
    ):
        works = [pool.submit(stored, farm) for _ in range(3)]
        works += [pool.submit(uploaded, farm, tmp_path / "new"), pool.submit(replayed, farm)]
        for work in works:
            work.result()
        wait_until(lambda: beside.deleted, what="the collectors delete something")
        collected = len(beside.deleted)
    missing = [one for one in accepted if not kept(farm, one)]
    assert missing == [], f"{len(missing)} of {len(accepted)} accepted jobs lost their picture"
    assert len(accepted) + len(refused) == 3 * 60 + 20 * 2 + 20
    assert collected > 0
    assert farm.ledger.counts()[JobState.QUEUED] == len(accepted)


def kept(farm: Farm, job_id: str) -> bool:
    try:
        return bool(input_of(farm, job_id))
    except StoreMissing:
        return False
