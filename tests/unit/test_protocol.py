"""What crosses the pipe between worker and engine comes out as it went in; nothing else gets through."""

import json
import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint_worker import protocol as p

EXAMPLES = [
    p.Render(
        job="j1", token=7, spec_json='{"version":1}', inputs={"a.png": b"\x89PNG", "": b""}, alone=True
    ),
    p.Cancel(job="j1", token=7),
    p.Load(model="sd15"),
    p.Stop(),
    p.Begin(),
    p.Warm(pid=1),
    p.Ready(
        pid=1, device="cpu", device_name="x", memory_total=2**40, features=["lora"],
        catalogue=[{"name": "tiny"}], versions={"torch": "2"},
    ),
    p.Loading(model="sd15"),
    p.Loaded(model="sd15", seconds=1.5),
    p.Unit(stage="denoise", budget_s=60, jobs=["j1", "j2"]),
    p.Progress(job="j1", token=7, stage="denoise", step=3, of=20, company=4),
    p.Done(job="j1", token=7, files={"image.png": b"\0" * 70000, "receipt.json": b"{}"}, summary={"n": [1]}),
    p.Failed(job="j1", token=7, error={"code": "input", "message": "ä"}, kind="job"),
    p.Cancelled(job="j1", token=7),
    p.Credits(slots=6),
    p.NotLoaded(model="tiny", error={"code": "model_load", "message": "torn"}),
    p.Stats(live=1, held=2, turns=3, rows=4, memory_used=5, models=["tiny"]),
]  # fmt: skip


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_every_message_comes_out_as_it_went_in(message):
    assert p.decode(p.encode(message)) == message


def test_every_kind_of_message_has_an_example_here():
    assert {type(m) for m in EXAMPLES} == set(p._BY_NAME.values())


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=20), st.binary(max_size=200), max_size=6)
)
def test_attachments_of_any_name_and_size_keep_their_bytes(inputs):
    message = p.Render(job="j", token=1, spec_json="{}", inputs=inputs)
    assert p.decode(p.encode(message)) == message


def _frame(header: object, body: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">I", len(head)) + head + body


BROKEN = {
    "nothing at all": b"",
    "less than a length": b"\0\0",
    "a header longer than the frame": struct.pack(">I", 100) + b"{}",
    "a header that is not JSON": _frame(b"\x80\x04K\x01."),
    "a header of deep brackets": _frame(b"[" * 100_000),
    "a header that is a list": _frame([1]),
    "an unknown message": _frame({"message": "exec"}),
    "a name that is no string": _frame({"message": ["stop"]}),
    "a missing field": _frame({"message": "cancel", "job": "j"}),
    "a field too many": _frame({"message": "load", "model": "m", "path": "/etc/passwd"}),
    "a field of the wrong type": _frame({"message": "cancel", "job": "j", "token": "7"}),
    "a boolean for a number": _frame({"message": "cancel", "job": "j", "token": True}),
    "attachments that are announced and do not come": _frame(
        {"message": "done", "job": "j", "token": 1, "files": {"a": 10}, "summary": {}}, b"short"
    ),
    "a negative attachment": _frame(
        {"message": "done", "job": "j", "token": 1, "files": {"a": -1}, "summary": {}}
    ),
    "bytes left over": _frame({"message": "stop"}, b"x"),
}


@pytest.mark.parametrize("frame", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_frame_is_a_typed_error(frame):
    with pytest.raises(p.ProtocolError):
        p.decode(frame)


def test_a_message_larger_than_the_limit_is_refused_before_it_is_sent(monkeypatch):
    monkeypatch.setattr(p, "MAX_FRAME_BYTES", 1000)
    small = p.Done(job="j", token=1, files={"image.png": b"x" * 100})
    assert p.decode(p.encode(small)) == small
    with pytest.raises(p.ProtocolError, match="too large"):
        p.encode(replace(small, files={"image.png": b"x" * 2000}))


def test_a_number_that_is_not_one_never_crosses():
    with pytest.raises(ValueError, match="not JSON compliant"):
        p.encode(p.Unit(stage="denoise", budget_s=float("nan")))


def test_the_protocol_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, overpaint_worker.protocol;"
        "print([m for m in ('torch', 'numpy', 'celery') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
