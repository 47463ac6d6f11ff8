import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import ResponseError

from overpaint_shared.queues import RENDER_TASK, STAMP_HEADER
from overpaint_worker.messages import MAX_BODY_CHARS, MAX_ITEM_BYTES, NoMessage, parsed, rebuilt
from overpaint_worker.transport import Refusals, SafeChannel


def body(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def message(job: object = "job-1", **changes: Any) -> dict[str, Any]:
    return {
        "body": body([[job], {}, {"chord": "x"}]),
        "headers": {
            "task": "os.system",
            "id": "other",
            "argsrepr": "tiny img2img 64x64",
            "eta": "2099-01-01T00:00:00",
        },
        "properties": {"priority": 6, "delivery_tag": {"evil": 1}, "reply_to": "elsewhere"},
        "content-type": "application/x-python-serialize",
    } | changes


def test_a_message_is_rebuilt_from_its_job_id_its_title_its_priority_and_its_stamp() -> None:
    item = message()
    item["headers"][STAMP_HEADER] = 12.5
    out = rebuilt(item, "m.tiny")
    assert json.loads(base64.b64decode(out["body"])) == [["job-1"], {}, {}]
    assert out["headers"] == {
        "lang": "py",
        "task": RENDER_TASK,
        "id": "job-1",
        "root_id": "job-1",
        "argsrepr": "tiny img2img 64x64",
        "kwargsrepr": "",
        STAMP_HEADER: 12.5,
    }
    assert out["content-type"] == "application/json"
    assert out["properties"]["priority"] == 6
    assert out["properties"]["delivery_info"] == {"exchange": "", "routing_key": "m.tiny"}
    assert "reply_to" not in out["properties"]
    assert isinstance(out["properties"]["delivery_tag"], str)


@pytest.mark.parametrize("priority", [-1, 10, True, "6", None, 6.0, {}])
def test_an_odd_priority_counts_as_first(priority: object) -> None:
    assert rebuilt(message(properties={"priority": priority}), "m.tiny")["properties"]["priority"] == 0


@pytest.mark.parametrize("title", [None, 7, ["x"], {"a": 1}])
def test_an_odd_title_is_replaced_by_the_job_id(title: object) -> None:
    assert rebuilt(message(headers={"argsrepr": title}), "m.tiny")["headers"]["argsrepr"] == "job-1"


@pytest.mark.parametrize(
    "stamp", [None, "now", float("nan"), float("inf"), [1], 10**400, -(10**400), -1, 1e300]
)
def test_an_odd_stamp_becomes_a_number(stamp: object) -> None:
    assert rebuilt(message(headers={STAMP_HEADER: stamp}), "m.tiny")["headers"][STAMP_HEADER] == 0.0


HOSTILE: dict[str, Any] = {
    "a list": [1, 2],
    "a string": "hello",
    "null": None,
    "a number": 5,
    "an empty object": {},
    "no headers": {"body": body([["job-1"], {}, {}])},
    "headers that are a list": message(headers=[1]),
    "headers that are null": message(headers=None),
    "properties that are a list": message(properties=[1]),
    "properties that are null": message(properties=None),
    "a body that is no base64": message(body="%%%"),
    "a body that is null": message(body=None),
    "a body that is a number": message(body=5),
    "a body that is not UTF-8": message(body=base64.b64encode(b"\xff\xfe").decode()),
    "a body that is no JSON": message(body=base64.b64encode(b"{").decode()),
    "deeply nested JSON": message(body=base64.b64encode(b"[" * 3000).decode()),
    "a large body": message(body=body([["x" * MAX_BODY_CHARS], {}, {}])),
    "no arguments": message(body=body([[], {}, {}])),
    "two arguments": message(body=body([["a", "b"], {}, {}])),
    "an argument that is an object": message(job={"a": 1}),
    "an argument that is a number": message(job=5),
    "a job id with a path": message(job="../../etc"),
    "a job id with a newline": message(job="job-1\n"),
    "an empty job id": message(job=""),
    "a long job id": message(job="x" * 65),
    "an object as body": message(body=body({"a": 1})),
}


@pytest.mark.parametrize("item", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_names_no_job_is_refused(item: object) -> None:
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError, RecursionError)):
        rebuilt(item, "m.tiny")


@pytest.mark.parametrize(
    "item",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"[" * 60_000,
        b"9" * 5000,
        '"a"'.encode("utf-16"),
        b" " * (MAX_ITEM_BYTES + 1),
    ],
)
def test_what_is_no_json_or_too_long_is_refused(item: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        parsed(item)


def test_a_long_item_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(NoMessage, match="bytes"):
        parsed(b"[" * (MAX_ITEM_BYTES + 1))


def test_what_an_item_calls_a_date_or_a_decimal_stays_what_it_says() -> None:
    item = {"__type__": "decimal", "__value__": "none"}
    assert parsed(json.dumps(item).encode()) == item


def test_a_title_that_would_move_a_terminals_cursor_is_shown_as_its_escapes() -> None:
    out = rebuilt(message(headers={"argsrepr": "\x1b[2J\ud800"}), "m.tiny")
    assert out["headers"]["argsrepr"] == "\\u001b[2J\\ud800"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None, max_examples=200)
@given(st.fixed_dictionaries({"body": JSON.map(body) | JSON, "headers": JSON, "properties": JSON}) | JSON)
def test_any_json_is_either_refused_or_rebuilt(item: object) -> None:
    try:
        out = rebuilt(item, "m.tiny")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return
    assert out["headers"]["task"] == RENDER_TASK
    assert json.loads(base64.b64decode(out["body"]))[0] == [out["headers"]["id"]]


def test_a_late_acknowledgement_on_a_closed_channel_is_no_error() -> None:
    """A worker's threads end jobs while Celery connects anew; kombu's own channel ends the worker then."""
    channel = SafeChannel.__new__(SafeChannel)
    channel.closed = True
    channel.basic_ack("tag")
    channel.basic_reject("tag", requeue=True)
    assert not channel.do_restore


def test_a_refusal_pauses_reading_and_is_told_once_until_it_ends() -> None:
    now = [0.0]
    refusals = Refusals(clock=lambda: now[0])
    with refusals.forgiven():
        raise ResponseError("NOREPLICAS Not enough good replicas to write.")
    assert refusals.pausing
    now[0] = 2.0
    assert not refusals.pausing
    assert refusals.refusing
    refusals.over()
    assert not refusals.refusing


def test_what_is_no_refusal_is_not_forgiven() -> None:
    with pytest.raises(KeyError), Refusals().forgiven():
        raise KeyError("x")
