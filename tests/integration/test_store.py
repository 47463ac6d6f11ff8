"""The store against a real S3 server; a stub answers only what a real one cannot be made to (a full disk)."""

import hashlib
import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import botocore.exceptions as boto
import pytest
from botocore.exceptions import IncompleteReadError
from pydantic import SecretStr

from overpaint_producer.services import S3Service, free_ports
from overpaint_shared import store as store_module
from overpaint_shared.errors import (
    InputError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreNoBucket,
    StoreUnreachable,
)
from overpaint_shared.setting_views import StoreSettings
from overpaint_shared.store import REFRESH_AFTER, Store
from overpaint_shared.store_keys import input_key

PICTURE = b"bytes that stand for a picture" * 100
SHA = hashlib.sha256(PICTURE).hexdigest()


@pytest.fixture
def store_settings(s3_server: S3Service, s3_bucket: str) -> StoreSettings:
    return StoreSettings(
        endpoint_url=s3_server.endpoint_url,
        bucket=s3_bucket,
        access_key=s3_server.access_key,
        secret_key=SecretStr(s3_server.secret_key),
    )


@pytest.fixture
def weak_settings(s3_server: S3Service, store_settings: StoreSettings) -> Callable[..., StoreSettings]:
    """Settings with a key of fewer rights, made known to the running server (it reads its keys on SIGHUP)."""

    def make(*actions: str) -> StoreSettings:
        path = s3_server.dir / "s3.json"
        config = json.loads(path.read_text())
        key = {"accessKey": f"weak{len(config['identities'])}", "secretKey": "weak-secret"}
        config["identities"].append(
            {"name": key["accessKey"], "credentials": [key], "actions": list(actions)}
        )
        path.write_text(json.dumps(config))
        s3_server.child.process.send_signal(signal.SIGHUP)
        weak = replace(store_settings, access_key=key["accessKey"], secret_key=SecretStr(key["secretKey"]))
        wait_until(lambda: is_known(weak))
        return weak

    return make


def is_known(settings: StoreSettings) -> bool:
    try:
        Store(settings).ping()
    except StoreDenied as error:
        return "InvalidAccessKeyId" not in error.message
    return True


def wait_until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end


@pytest.fixture
def store(store_settings: StoreSettings) -> Store:
    store = Store(store_settings)
    store.ensure_bucket()
    return store


@dataclass
class Recorder:
    """Counts the calls of a store's own boto3 client by operation."""

    calls: list[str] = field(default_factory=list)

    def __call__(self, params: Any, model: Any, **_: Any) -> None:
        self.calls.append(model.name)


@pytest.fixture
def recorded(store: Store) -> Iterator[list[str]]:
    recorder = Recorder()
    store._s3.meta.events.register("before-call.s3", recorder)
    yield recorder.calls
    store._s3.meta.events.unregister("before-call.s3", recorder)


def test_an_input_comes_back_with_its_bytes(store: Store) -> None:
    assert store.put_input("ann", PICTURE) == SHA
    assert store.get_input("ann", SHA, len(PICTURE)) == PICTURE


def test_an_input_is_sent_once_by_one_process(store: Store, recorded: list[str]) -> None:
    data = PICTURE + b"once"
    store.put_input("ann", data)
    store.put_input("ann", data)
    assert recorded == ["HeadObject", "PutObject"]


def test_an_input_that_another_process_sent_is_not_sent_again(store: Store, recorded: list[str]) -> None:
    store.put_input("ann", PICTURE + b"other")
    recorded.clear()
    Store(store.settings).put_input("ann", PICTURE + b"other")
    assert recorded == ["HeadObject"]


def test_an_old_input_is_written_anew_so_that_the_collector_spares_it(
    store: Store, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_input("ann", PICTURE + b"old")
    recorded.clear()
    monkeypatch.setattr(store_module, "REFRESH_AFTER", timedelta(seconds=-REFRESH_AFTER.total_seconds()))
    Store(store.settings).put_input("ann", PICTURE + b"old")
    assert recorded == ["HeadObject", "PutObject"]


def test_many_threads_that_send_the_same_input_all_succeed(store: Store) -> None:
    data = PICTURE + b"race"
    stores = [Store(store.settings) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        shas = list(pool.map(lambda one: one.put_input("ann", data), stores))
    assert set(shas) == {hashlib.sha256(data).hexdigest()}
    assert store.get_input("ann", shas[0], len(data)) == data


def test_an_owner_cannot_read_the_input_of_another(store: Store) -> None:
    store.put_input("ann", PICTURE)
    with pytest.raises(StoreMissing):
        store.get_input("bob", SHA, len(PICTURE))


@pytest.mark.parametrize("owner", ["..", "a/b", "", ".hidden", "a" * 200, "a\nb"])
def test_an_owner_that_could_leave_its_folder_is_refused(store: Store, owner: str) -> None:
    with pytest.raises(ValueError, match="cannot be part of a key"):
        store.put_input(owner, PICTURE)


def test_an_input_with_the_wrong_bytes_is_put_right(store: Store) -> None:
    data = PICTURE + b"torn"
    key = input_key("ann", hashlib.sha256(data).hexdigest())
    store._s3.put_object(Bucket=store.settings.bucket, Key=key, Body=b"half of i")
    store.put_input("ann", data)
    assert store.get_input("ann", hashlib.sha256(data).hexdigest(), len(data)) == data


def test_a_damaged_input_is_told_and_never_returned(store: Store) -> None:
    data = PICTURE + b"damaged"
    sha = store.put_input("ann", data)
    key = input_key("ann", sha)
    store._s3.put_object(Bucket=store.settings.bucket, Key=key, Body=b"x" * len(data))
    with pytest.raises(StoreError, match="damaged"):
        store.get_input("ann", sha, len(data))


def test_a_large_object_is_refused_before_it_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = store.put_input("ann", PICTURE)
    monkeypatch.setattr(store_module, "_capped", lambda *_: pytest.fail("it was read"))
    with pytest.raises(InputError, match=f"{len(PICTURE)} bytes") as caught:
        store.get_input("ann", sha, len(PICTURE) - 1)
    assert caught.value.fix is not None
    assert "OVERPAINT_MAX_INPUT_BYTES" in caught.value.fix


def test_a_stream_longer_than_promised_is_cut_off() -> None:
    served = iter([b"12345", b"67890", b"unread"])
    with pytest.raises(InputError):
        store_module._capped(lambda _: next(served), "key", 9)
    assert next(served) == b"unread"


def test_a_body_that_is_cut_off_is_read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = store.put_input("ann", PICTURE)
    whole, cuts = store_module._capped, [IncompleteReadError(actual_bytes=1, expected_bytes=2)]

    def cut_once(*args: Any) -> bytes:
        if cuts:
            raise cuts.pop()
        return whole(*args)

    monkeypatch.setattr(store_module, "_capped", cut_once)
    assert store.get_input("ann", sha, len(PICTURE)) == PICTURE
    assert cuts == []


def test_a_body_that_is_always_cut_off_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = store.put_input("ann", PICTURE)

    def cut(*_: Any) -> bytes:
        raise IncompleteReadError(actual_bytes=1, expected_bytes=2)

    monkeypatch.setattr(store_module, "_capped", cut)
    with pytest.raises(StoreUnreachable):
        store.get_input("ann", sha, len(PICTURE))


def test_a_result_lies_under_its_job_and_token(store: Store) -> None:
    key = store.put_result("job-1", 7, "image.png", PICTURE, "image/png")
    assert key == "results/job-1/7/image.png"
    assert store.get(key, len(PICTURE)) == PICTURE
    assert store._s3.head_object(Bucket=store.settings.bucket, Key=key)["ContentType"] == "image/png"


def test_a_result_written_again_with_the_same_bytes_is_no_error(store: Store) -> None:
    store.put_result("job-2", 7, "image.png", PICTURE, "image/png")
    assert store.put_result("job-2", 7, "image.png", PICTURE, "image/png") == "results/job-2/7/image.png"


def test_a_result_is_never_overwritten_by_other_bytes(store: Store) -> None:
    key = store.put_result("job-3", 7, "image.png", PICTURE, "image/png")
    with pytest.raises(StoreError, match="other bytes"):
        store.put_result("job-3", 7, "image.png", PICTURE[::-1], "image/png")
    assert store.get(key, len(PICTURE)) == PICTURE


def test_a_picture_under_a_name_of_its_own_is_its_owners_and_the_last_one_stays(store: Store) -> None:
    keys = ["named/ann/shots/ü 12.png"] * 2
    for data in (PICTURE, PICTURE[::-1]):
        assert store.put_named("ann", "shots/ü 12.png", data, "image/png", allowed=lambda: True)
    assert not store.put_named("ann", "shots/ü 12.png", PICTURE, "image/png", allowed=lambda: False)

    assert store.get(keys[0], 1 << 20) == PICTURE[::-1]
    for name in ("", "/x", "a//b", "../bob/x", "a/./b"):
        with pytest.raises(ValueError, match="no relative key"):
            store.put_named("ann", name, PICTURE, "image/png", allowed=lambda: True)


def test_a_retried_write_that_meets_its_own_first_success_succeeds(store: Store) -> None:
    """The server stores the object, its answer is lost, botocore sends again and gets 412."""
    lost: list[int] = []

    def lose_the_first_answer(**kwargs: Any) -> int | None:
        response = kwargs["response"]
        if response is not None and response[0].status_code == 200 and not lost:
            lost.append(1)
            return 0
        return None

    events = store._s3.meta.events
    events.register_first("needs-retry.s3.PutObject", lose_the_first_answer)
    try:
        key = store.put_result("job-4", 1, "image.png", PICTURE, "image/png")
        assert store.put_input("ann", PICTURE + b"retried")
    finally:
        events.unregister("needs-retry.s3.PutObject", lose_the_first_answer)
    assert lost == [1]
    assert store.get(key, len(PICTURE)) == PICTURE


def test_a_link_is_readable_without_a_key_until_it_ends(store: Store) -> None:
    key = store.put_result("job-5", 1, "image.png", PICTURE, "image/png")
    with urllib.request.urlopen(store.link(key, 60)) as answer:  # noqa: S310 - the address is our own server's
        assert answer.read() == PICTURE
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(store.link(key, 60).replace("X-Amz-Signature=", "X-Amz-Signature=0"))  # noqa: S310


def test_a_link_names_the_server_as_browsers_reach_it_and_is_signed_for_that_name(
    s3_server: S3Service, store_settings: StoreSettings
) -> None:
    """As in containers: the farm calls the server by one name, people by another."""
    inside = Store(replace(store_settings, public_url=f"http://localhost:{s3_server.port}"))
    key = inside.put_result("linked", 1, "a.png", PICTURE, "image/png")
    link = inside.link(key, 60)
    assert link.startswith(f"http://localhost:{s3_server.port}/")
    with urllib.request.urlopen(link) as answer:  # noqa: S310 - the address is our own server's
        assert answer.read() == PICTURE
    with pytest.raises(urllib.error.HTTPError, match="403"):  # the host is part of what is signed
        urllib.request.urlopen(link.replace("localhost", "127.0.0.1"))  # noqa: S310


@pytest.mark.parametrize("seconds", [0, 604_801])
def test_a_link_that_cannot_live_so_long_is_refused(store: Store, seconds: int) -> None:
    with pytest.raises(ValueError, match="seconds"):
        store.link("results/a/1/b", seconds)


def test_deleting_an_attempt_spares_the_others(store: Store) -> None:
    for token in (1, 10):
        for name in ("image.png", "receipt.json"):
            store.put_result("job-6", token, name, PICTURE, "image/png")
    assert store.delete_attempt("job-6", 1) == 2
    mine = [attempt for attempt in store.attempts() if attempt.job_id == "job-6"]
    assert [(attempt.token, attempt.size) for attempt in mine] == [(10, 2 * len(PICTURE))]
    assert datetime.now(UTC) - mine[0].modified < timedelta(minutes=5)


def test_inputs_are_listed_by_owner_and_foreign_objects_passed_over(store: Store) -> None:
    sha = store.put_input("carol", PICTURE)
    store._s3.put_object(Bucket=store.settings.bucket, Key="inputs/carol/notes.txt", Body=b"hello")
    assert [(found.sha256, found.size) for found in store.inputs() if found.owner == "carol"] == [
        (sha, len(PICTURE))
    ]
    store.delete_input("carol", sha)
    assert not store.has_input("carol", sha)
    assert not [found for found in store.inputs() if found.owner == "carol"]


def test_a_deleted_input_is_sent_again(store: Store) -> None:
    sha = store.put_input("dora", PICTURE)
    store.delete_input("dora", sha)
    store.put_input("dora", PICTURE)
    assert store.has_input("dora", sha)


def test_an_external_picture_is_read_from_an_allowed_bucket_only(store: Store) -> None:
    store._s3.create_bucket(Bucket="photos")
    store._s3.put_object(Bucket="photos", Key="a folder/who?#.png", Body=PICTURE)
    reader = Store(replace(store.settings, read_buckets=("photos",)))
    assert reader.read_external("s3://photos/a folder/who?#.png", len(PICTURE)) == PICTURE
    with pytest.raises(InputError, match="may not read from bucket 'overpaint'"):
        reader.read_external("s3://overpaint/inputs/bob/secret", len(PICTURE))
    with pytest.raises(InputError, match="allowed: none"):
        store.read_external("s3://photos/who.png", len(PICTURE))


@pytest.mark.parametrize("url", ["s3://", "s3://photos", "s3://photos/", "http://photos/x", "photos/x"])
def test_an_address_that_is_not_whole_is_refused(store: Store, url: str) -> None:
    with pytest.raises(InputError, match="no S3 address"):
        store.read_external(url, 10)


def test_one_client_serves_all_stores_of_a_process(store: Store) -> None:
    assert Store(replace(store.settings))._s3 is store._s3


# What can be wrong with the service


def test_no_server_is_told(store: Store) -> None:
    gone = Store(replace(store.settings, endpoint_url=f"http://127.0.0.1:{free_ports(1)[0]}"))
    with pytest.raises(StoreUnreachable, match="does not answer") as caught:
        gone.ping()
    assert "OVERPAINT_S3_ENDPOINT_URL" in str(caught.value.fix)


def test_an_address_that_is_none_is_told(store: Store) -> None:
    with pytest.raises(StoreError):
        Store(replace(store.settings, endpoint_url="nonsense")).ping()


USES: dict[str, Callable[[Store], object]] = {
    "a look into the bucket": Store.ping,
    "a submit": lambda store: store.put_input("ann", PICTURE),
    "a look for an input": lambda store: store.has_input("ann", SHA),
    "a fetch": lambda store: store.get("results/a/1/b", 10),
    "a result": lambda store: store.put_result("a", 1, "b", PICTURE, "image/png"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_wrong_secret_is_told_alike_whatever_was_tried(
    store: Store, use: Callable[[Store], object]
) -> None:
    with pytest.raises(StoreDenied, match=r"does not accept this key.*SignatureDoesNotMatch") as caught:
        use(Store(replace(store.settings, secret_key=SecretStr("wrong"))))
    assert "OVERPAINT_S3_SECRET_KEY" in str(caught.value.fix)


def test_an_unknown_key_is_told(store: Store) -> None:
    with pytest.raises(StoreDenied, match="InvalidAccessKeyId"):
        Store(replace(store.settings, access_key="nobody")).ping()


def test_a_missing_bucket_is_told(store: Store) -> None:
    with pytest.raises(StoreNoBucket, match="no bucket 'nowhere'") as caught:
        Store(replace(store.settings, bucket="nowhere")).ping()
    assert "OVERPAINT_S3_BUCKET" in str(caught.value.fix)


def test_a_missing_bucket_is_made_once(store: Store) -> None:
    fresh = Store(replace(store.settings, bucket="made-by-a-test"))
    assert fresh.ensure_bucket()
    assert not fresh.ensure_bucket()
    fresh.ping()


def test_a_key_without_permission_is_told(store: Store, weak_settings: Callable[..., StoreSettings]) -> None:
    reader = Store(weak_settings("Read", "List"))
    reader.ping()
    with pytest.raises(StoreDenied, match="no permission") as caught:
        reader.put_input("ann", PICTURE + b"forbidden")
    assert "grant" in str(caught.value.fix)


def test_a_missing_object_is_told(store: Store) -> None:
    with pytest.raises(StoreMissing, match="no object 'results/a/1/b'"):
        store.get("results/a/1/b", 10)


class FixedAnswer(BaseHTTPRequestHandler):
    """Holds no object, and answers every PUT alike."""

    status: int
    body: bytes

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


ERROR = "<Error><Code>{}</Code><Message>{}</Message></Error>"


@contextmanager
def answering(store: Store, status: int, body: str) -> Iterator[Store]:
    """A store whose server answers every PUT like this."""
    handler = type("Handler", (FixedAnswer,), {"status": status, "body": body.encode()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Store(replace(store.settings, endpoint_url=f"http://127.0.0.1:{server.server_port}"))
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (507, ""),
        (
            507,
            ERROR.format(
                "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."
            ),
        ),
        (500, ERROR.format("InternalError", "write /data/1.dat: no space left on device")),
        (403, ERROR.format("QuotaExceeded", "too much")),
    ],
    ids=["bare 507", "MinIO", "SeaweedFS", "quota"],
)
def test_a_full_disk_is_told(store: Store, status: int, body: str) -> None:
    with answering(store, status, body) as full, pytest.raises(StoreFull, match="is full") as caught:
        full.put_result("job", 1, "image.png", PICTURE, "image/png")
    assert "overpaint gc" in str(caught.value.fix)


def test_a_bucket_that_vanished_is_told_when_an_input_is_sent(store: Store) -> None:
    # SeaweedFS makes missing buckets on the way, other servers answer this.
    gone = ERROR.format("NoSuchBucket", "The specified bucket does not exist")
    with answering(store, 404, gone) as lost, pytest.raises(StoreNoBucket, match="no bucket"):
        lost.put_input("ann", PICTURE)


def test_a_server_that_fails_is_told_as_one_that_does_not_answer(store: Store) -> None:
    with answering(store, 503, "") as broken, pytest.raises(StoreUnreachable, match="status 503"):
        broken.put_input("ann", PICTURE)


def test_no_secret_shows_in_an_error(store: Store) -> None:
    with pytest.raises(StoreDenied) as caught:
        Store(replace(store.settings, access_key="nobody")).ping()
    assert store.settings.secret_key is not None
    secret = store.settings.secret_key.get_secret_value()
    assert secret not in f"{caught.value!r} {caught.value} {caught.value.to_json()} {store.settings!r}"


def test_an_error_of_boto3_never_gets_through(store: Store) -> None:
    with pytest.raises(StoreError) as caught:
        Store(replace(store.settings, bucket="Not A Bucket")).ping()
    assert not isinstance(caught.value, boto.BotoCoreError)
