"""Following jobs live."""

from collections.abc import Collection, Iterator
from typing import Final, Self

from redis.client import PubSub

from overpaint_shared.ledger.faults import typed_errors, unreachable
from overpaint_shared.ledger.listing import Client
from overpaint_shared.ledger.records import Event
from overpaint_shared.ledger.states import JobState
from overpaint_shared.ledger.tolerance import json_object

_FOREVER_S: Final = 1.0  # how long one wait of the endless iterator is
_CONFIRM_S: Final = 5.0


def channel(owner: str) -> str:
    """Where every change to a job of `owner` is published."""
    return f"op:events:{owner}"


class Events:
    """The events of one owner's jobs, from the moment the context is entered.

    Pub/Sub drops what it cannot deliver: read the records after entering, and again whenever it matters.
    """

    def __init__(self, client: Client, where: str, owner: str, ids: Collection[str] | None) -> None:
        self._where = where
        self._channel = channel(owner)
        self._ids = None if ids is None else frozenset(ids)
        self._pubsub: PubSub = client.pubsub(ignore_subscribe_messages=False)

    def __enter__(self) -> Self:
        try:
            with typed_errors(self._where):
                self._subscribe()
        except BaseException:
            self._pubsub.close()
            raise
        return self

    def _subscribe(self) -> None:
        """Return once Redis has confirmed the subscription: nothing later than this is missed."""
        self._pubsub.subscribe(self._channel)
        while (message := self._pubsub.get_message(timeout=_CONFIRM_S)) is not None:
            if message["type"] == "subscribe":
                return
        raise unreachable("it did not confirm the subscription", self._where)

    def __exit__(self, *_: object) -> None:
        self._pubsub.close()

    def poll(self, timeout_s: float) -> Event | None:
        """The next event, or None when `timeout_s` passed without one for these jobs, or a little earlier."""
        with typed_errors(self._where):
            message = self._pubsub.get_message(timeout=timeout_s)
        if message is None or message["type"] != "message":
            return None
        event = _parsed(message["data"])
        if event is None or (self._ids is not None and event.job_id not in self._ids):
            return None
        return event

    def __iter__(self) -> Iterator[Event]:
        """Events without end."""
        while True:
            if (event := self.poll(_FOREVER_S)) is not None:
                yield event


def _parsed(data: str) -> Event | None:
    """The event that a message tells; None for a message that is no event."""
    raw = json_object(data) or {}
    try:
        return Event(
            job_id=str(raw["job"]),
            state=JobState(raw["state"]),
            stage=None if raw.get("stage") is None else str(raw["stage"]),
            step=int(raw.get("step", 0)),
            of=int(raw.get("of", 0)),
            attempt=int(raw.get("attempt", 0)),
            at=float(raw.get("at", 0)),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
