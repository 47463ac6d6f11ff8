"""Structured logs: one line for each change of state, with a stable `action`, and no secrets.

Celery's, kombu's and our own records go the same way. Lines are for people, or JSON with `--json-logs`.
"""

import logging
import re
import sys
from collections.abc import Iterable, MutableMapping
from typing import Any, TextIO

import structlog

from overpaint_shared.errors import visible

_URL_PASSWORD = re.compile(r"(?<=[a-z0-9+.-])://[^/@\s]*@", re.IGNORECASE)
_SECRET_NAMES = re.compile(r"password|secret|access_key|credential", re.IGNORECASE)
_MASK = "***"
_OF_LINES = ("exception", "stack")

Event = MutableMapping[str, Any]

_identity: dict[str, str] = {}


def identify(**names: str) -> None:
    """Say in every line from now on who this process is, whichever thread writes it."""
    _identity.update(names)


def _who(_logger: Any, _method: str, event: Event) -> Event:
    for name, value in _identity.items():
        event.setdefault(name, value)
    return event


class Masker:
    """Replaces passwords in URLs, values under telling names, and the secrets it was given."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = sorted((s for s in secrets if len(s) >= 4), key=len, reverse=True)

    def text(self, text: str) -> str:
        """`text` without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, _MASK)
        return _URL_PASSWORD.sub(f"://{_MASK}@", text)

    def __call__(self, _logger: Any, _method: str, event: Event) -> Event:
        """Structlog's processor."""
        for name, value in event.items():
            if _SECRET_NAMES.search(name):
                event[name] = _MASK
            elif isinstance(value, str):
                event[name] = self.text(value)
        return event


def printable(_logger: Any, _method: str, event: Event) -> Event:
    """Structlog's processor for people: what a stranger wrote neither moves the cursor nor makes a line."""
    for name, value in event.items():
        if isinstance(value, str):
            safe = visible(value)
            event[name] = safe if name in _OF_LINES else safe.replace("\n", "\\n")
    return event


_maskers: list[Masker] = [Masker()]


def masked(text: str) -> str:
    """`text` without the secrets that logs must not show either."""
    return _maskers[-1].text(text)


def configure(*, as_json: bool, secrets: Iterable[str] = (), stream: TextIO | None = None) -> None:
    """Send structlog's and the standard library's records to `stream` (standard error), masked."""
    masker = Masker(secrets)
    _maskers[:] = [masker]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _who,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    render: list[structlog.typing.Processor] = (
        [structlog.processors.JSONRenderer(default=str)]
        if as_json
        else [printable, structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0)]
    )
    out = stream or sys.stderr
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                masker,
                *render,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for noisy in ("celery.app.trace", "celery.worker.strategy", "botocore", "boto3", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # a job's own lines say more
