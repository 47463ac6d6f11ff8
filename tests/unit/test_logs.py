import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from overpaint_worker import logs


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    stream = io.StringIO()
    logs.configure(as_json=True, secrets=["s3cr3t-key"], stream=stream)
    yield stream
    root.handlers[:], root.level = before[0], before[1]
    structlog.reset_defaults()
    for name in ("celery.app.trace", "celery.worker.strategy", "botocore", "boto3", "urllib3"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def lines(out: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_has_its_action_and_what_is_bound(out: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(job="j1", token=7):
        structlog.get_logger("x").info("job claimed", action="job.claimed")
    (line,) = lines(out)
    assert (line["event"], line["action"], line["job"], line["token"]) == (
        "job claimed",
        "job.claimed",
        "j1",
        7,
    )
    assert line["level"] == "info"


def test_celerys_own_records_come_the_same_way(out: io.StringIO) -> None:
    logging.getLogger("celery.worker").warning("Connected to %s", "redis://u:pw@host:6379/0")
    (line,) = lines(out)
    assert line["event"] == "Connected to redis://***@host:6379/0"


def test_secrets_are_masked_wherever_they_stand(out: io.StringIO) -> None:
    log = structlog.get_logger("x")
    log.info("a s3cr3t-key b", action="a", url="rediss://:pw@h/0", password="hunter2", s3_secret_key="other")
    try:
        raise ValueError("s3cr3t-key in a traceback")
    except ValueError:
        log.exception("failed", action="b")
    text = out.getvalue()
    assert "s3cr3t-key" not in text
    assert "pw@" not in text
    assert "hunter2" not in text
    assert "other" not in text
    assert "in a traceback" in text


def test_lines_for_people_are_masked_too(out: io.StringIO) -> None:
    logs.configure(as_json=False, secrets=["s3cr3t-key"], stream=out)
    structlog.get_logger("x").info("with s3cr3t-key", action="a")
    assert "with ***" in out.getvalue()
