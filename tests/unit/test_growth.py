"""What reads a stranger's text takes time in proportion to its length.

Ten times the text is never fifty times the work.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from overpaint_producer.children import Child
from overpaint_shared.errors import OverpaintError, shorten, visible
from overpaint_shared.job import parse_job
from overpaint_shared.spec.features import has_weights
from overpaint_worker.engine.families.prompt import stretches
from overpaint_worker.logs import Masker

SHORT, LONG = 2_000, 20_000
MOST = 5 * LONG / SHORT
LEAST_S = 0.001
"""A shorter time says nothing."""
PATTERNS = [
    "(", ")", "()", "((a:1", "(a:", ":", "1", "\\(", "\\", " ", "a", "[error] ", "error='", "' a", "://",
    "a:/", "@", "\x1b", "é", '"', "{", "[", ",", ", ]", "-", "a.", "..", "\n",
]  # fmt: skip
"""Repeated to the length that is asked for."""


def spec(**more: Any) -> bytes:
    """A job, as the text of its file."""
    job = {"version": 1, "model": "m", "source": {"image": "a.png"}, "method": {"kind": "img2img"}}
    return json.dumps({**job, **more}).encode()


def faults(text: str, log: Path) -> None:
    log.write_text(text)
    Child(name="worker", process=None, log=log).faults()  # type: ignore[arg-type] - only its log is read


READERS: dict[str, Callable[[str, Path], object]] = {
    "a prompt": lambda text, _: stretches.__wrapped__(text),
    "a prompt that ends as a number does": lambda text, _: stretches.__wrapped__(f"(a:{text}x)"),
    "whether a prompt has weights": lambda text, _: has_weights(text),
    "a log line with passwords": lambda text, _: Masker().text(text),
    "a log of complaints": faults,
    "a complaint": lambda text, log: faults(f"[error] x {text} action=a error='{text}", log),
    "a text for people": lambda text, _: (visible(text), shorten(text)),
    "a job with that prompt": lambda text, _: parse_job(spec(prompt=text)),
    "a job with that model": lambda text, _: parse_job(spec(model=text)),
    "a job with that picture": lambda text, _: parse_job(spec(source={"image": text[:4096]})),
    "a job with that S3 picture": lambda text, _: parse_job(spec(source={"image": f"s3://{text[:4000]}"})),
    "a job with that method": lambda text, _: parse_job(spec(method={"kind": text})),
    "a job with that key": lambda text, _: parse_job(spec(**{text: 1})),
    "a job with that name": lambda text, _: parse_job(spec(output={"key": text})),
    "a text that may be a job": lambda text, _: parse_job(text),
    "a job with that behind": lambda text, _: parse_job(spec() + text.encode()),
    "a job with that inside": lambda text, _: parse_job(spec()[:-1] + text.encode() + b"}"),
}


def seconds(read: Callable[[str, Path], object], text: str, folder: Path) -> float:
    """The shortest of three."""
    found = []
    for _ in range(3):
        began = time.thread_time()
        with suppress(OverpaintError):
            read(text, folder / "log")
        found.append(time.thread_time() - began)
    return min(found)


@pytest.mark.parametrize("reader", READERS)
def test_a_text_of_ten_times_the_length_takes_no_fifty_times_the_work(reader: str, tmp_path: Path) -> None:
    slow = {}
    for pattern in PATTERNS:
        short, long = ((pattern * (n // len(pattern) + 1))[:n] for n in (SHORT, LONG))
        spent = seconds(READERS[reader], long, tmp_path)
        if spent > MOST * LEAST_S and spent > MOST * seconds(READERS[reader], short, tmp_path):
            slow[pattern] = spent

    assert not slow
