"""The end of an engine's output, as it is kept for `overpaint dead show`."""

import os

import pytest

from overpaint_worker.engine_output import KEPT_BYTES, LINE_CHARACTERS, EngineOutput, readable


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (b"one\n\ntwo\n", "one\ntwo"),
        (b"\x1b[31mred\x1b[0m\n", "red"),
        (b"up\x1b]0;title\x07\n", "up\\u001b]0;title\\u0007"),
        (b"\xff broken\n", "\ufffd broken"),
        (b"redis://worker:secret-word@host:1/0\n", "redis://***@host:1/0"),
        (b"S3_SECRET_KEY=abc password: 'x y'\n", "S3_SECRET_KEY=*** password: *** y'"),
        (b"x" * 1000, "x" * LINE_CHARACTERS),
    ],
)
def test_what_is_kept_can_be_shown(written: bytes, kept: str) -> None:
    assert readable(written) == kept


def test_only_whole_lines_of_the_end_are_kept() -> None:
    lines = [f"line {number:04}" for number in range(1000)]
    kept = readable("\n".join(lines).encode()).splitlines()
    assert kept == lines[-len(kept) :]
    assert KEPT_BYTES - 20 < len("\n".join(kept)) <= KEPT_BYTES


def test_output_is_passed_on_and_its_end_kept(capfd: pytest.CaptureFixture[str]) -> None:
    theirs, ours = os.pipe()
    output = EngineOutput(os.fdopen(theirs, "rb"))
    os.write(ours, b"Fatal Python error: Segmentation fault\n")
    os.close(ours)
    output.drain(10)
    assert output.last_words() == "Fatal Python error: Segmentation fault"
    assert capfd.readouterr().err == "Fatal Python error: Segmentation fault\n"
