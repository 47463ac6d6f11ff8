"""Celery's remote control, as a worker lets it in.

Whoever may publish to the channel of remote control can send any command, and Redis cannot tell a question
from an order. So a worker answers questions, which is what Flower needs, and refuses orders (revoke, shut
down, change the pool, read other queues) unless it was started with `--remote-control all`.
"""

import re
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

import structlog
from celery import Celery
from kombu import pidbox

from overpaint_shared.errors import shorten

RemoteControl = Literal["inspect", "all"]

QUESTIONS: Final = frozenset(
    {
        "ping", "clock", "conf", "dump_conf", "stats", "report", "active_queues", "registered", "dump_tasks",
        "scheduled", "dump_schedule", "active", "dump_active", "reserved", "dump_reserved", "revoked",
        "dump_revoked", "query_task", "heartbeat", "enable_events",
    }
)  # fmt: skip
"""The commands that change nothing. `hello` is none of them: it carries revokes."""
SAID_EVERY_S: Final = 10.0
LONGEST_SHOWN: Final = 60
LONGEST_PATTERN: Final = 200
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# kombu ships no types.
_Node: Any = pidbox.Node

log = structlog.get_logger(__name__)


class RefusedCommand(ValueError):
    """A message of remote control that this worker does not obey."""


class GuardedNode(_Node):  # type: ignore[misc]
    """Obeys the commands that are allowed, and sends answers to nothing but queues for answers."""

    allowed: ClassVar[frozenset[str] | None] = QUESTIONS
    """None: all that Celery knows."""
    _said: float | None = None

    def handle_message(self, body: Any, message: Any = None) -> Any:
        """One message of the channel, which may hold anything."""
        try:
            self._check(body)
            return super().handle_message(body, message)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            self._say(error)
            return None

    def _check(self, body: Any) -> None:
        if not isinstance(body, Mapping) or not isinstance(body.get("method"), str):
            raise RefusedCommand("a message that names no command")
        method, arguments = body["method"], body.get("arguments") or {}
        if method not in self.handlers or (self.allowed is not None and method not in self.allowed):
            raise RefusedCommand(f"the command {method[:LONGEST_SHOWN]!r}")
        if not isinstance(arguments, Mapping) or not isinstance(body.get("destination") or [], list):
            raise RefusedCommand(f"odd arguments of the command {method!r}")
        pattern, matcher = body.get("pattern"), body.get("matcher")
        if (pattern or matcher) and (matcher != "glob" or not _is_short(pattern)):
            # Another matcher is a regular expression, which may take for ever.
            raise RefusedCommand(f"a pattern of the command {method!r} that is no short glob")
        # An answer is put into any queue that the question names, with this worker's rights.
        if (reply_to := body.get("reply_to")) is not None and not self._is_mailbox(reply_to):
            raise RefusedCommand(f"an answer to {method!r} for a queue that is not for answers")

    def _is_mailbox(self, reply_to: Any) -> bool:
        return (
            isinstance(reply_to, Mapping)
            and reply_to.get("exchange") == self.mailbox.reply_exchange.name
            and isinstance(reply_to.get("routing_key"), str)
            and _UUID.fullmatch(reply_to["routing_key"]) is not None
        )

    def _say(self, error: Exception) -> None:
        now = time.monotonic()
        if self._said is None or now - self._said >= SAID_EVERY_S:  # a flood must not fill the log
            self._said = now
            log.warning("remote control refused", action="control.refused", reason=shorten(str(error)))


def _is_short(pattern: object) -> bool:
    return isinstance(pattern, str) and len(pattern) <= LONGEST_PATTERN


def install(app: Celery, allowed: RemoteControl) -> None:
    """Guard the remote control of a worker's app."""
    chosen = {"allowed": QUESTIONS if allowed == "inspect" else None}
    mailbox: pidbox.Mailbox = app.control.mailbox  # type: ignore[attr-defined]
    mailbox.node_cls = type("Node", (GuardedNode,), chosen)


__all__ = ["QUESTIONS", "GuardedNode", "RemoteControl", "install"]
