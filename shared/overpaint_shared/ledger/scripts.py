"""The Lua scripts: read from their files, given the tables they share with Python, run by their SHA.

Every script is its own file after those of the definitions below, of the shared files (`LIBRARY`) that
it needs (see `lua_library.py`).
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final, TypeVar

import redis
from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from overpaint_shared.ledger.lua_library import Definition, definitions, needed
from overpaint_shared.ledger.states import MOVES, TERMINAL

PRIORITY_CLASSES: Final = (0, 3, 6, 9)
"""The first priority of each class, which is also its Celery priority. 0 is first."""
QUEUE_PREFIX: Final = "m."
"""A model's queue is this and the model's name."""
PRIORITY_SEPARATOR: Final = "\x06\x16"
"""What kombu puts between a queue's name and a priority above 0, in the name of the Redis list."""

PACE_SLICE_S: Final = 10
PACE_SLICES: Final = 60
"""The rate of a queue is that of the last PACE_SLICES * PACE_SLICE_S seconds, its pauses left out."""

CONDEMNED_S: Final = 120
"""When a deletion of an input has certainly ended, though its collector never said so."""
REMEMBERED_S: Final = 7200
"""How long an ended deletion is remembered. Who looked for its pictures earlier must look again."""

SLACK_S: Final = 2
"""A publisher may be this slow without its message being taken for lost."""
CONFIRMED: Final = 0.4
"""A message is lost once it was missed for this part of `reap_grace_s`.

One that is being taken is in no list, until its job is claimed.
"""

LOST_S: Final = 3600
"""Lost workers count against a job for so long."""
LOST_IN_ALL: Final = 4
"""A job that lost this many times `max_lost_hosts` workers is dead, whatever else was lost meanwhile."""
MAX_QUEUED: Final = 100_000
MAX_SPEC_BYTES: Final = 256 * 2**20
SUBMITS_PER_S: Final = 10_000
"""What an owner may have waiting, and submit, where the operator has not said."""
BURST_S: Final = 10
"""Submits of so many seconds may come at once."""
AUDIT_KEPT: Final = 10_000
"""Lines of the audit trail that are kept: so many of producers, and so many of workers and operators."""
ENDS_KEPT: Final = 12
"""Attempts of a job of which it is kept how they ended."""

NAMES: Final = (
    "audit",  # before the others: who finds a script of `PRODUCERS` there finds this one, too
    "submit",
    "condemn",
    "deleted",
    "claim",
    "renew",
    "finish",
    "release",
    "cancel",
    "replay",
    "discard",
    "expire",
    "tend",
    "fail",
    "unserved",
    "sweep",
    "scrub",
    "late",
    "announce",
)

PRODUCERS: Final = ("audit", "submit", "cancel", "replay", "condemn", "deleted")
"""The scripts that producers run."""
KEPT: Final = "op:scripts"
KEPT_SINCE: Final = "op:scripts:since"
KEPT_S: Final = 30 * 86_400
KEPT_AGAIN_S: Final = 86_400
WAIT_S: Final = 10.0
"""How long a producer waits for others to load the scripts: workers look every few seconds."""
WAIT_STEP_S: Final = 0.2

T = TypeVar("T")


LIBRARY: Final = ("guard", "prelude", "quota", "note")


def _lua_string(text: str) -> str:
    return '"' + "".join(f"\\{ord(char):03d}" for char in text) + '"'


def _constants() -> str:
    """What Lua and Python must agree on, as Lua."""
    moves = ", ".join(
        f"{before} = {{{', '.join(f'{after} = true' for after in sorted(afters))}}}"
        for before, afters in MOVES.items()
    )
    terminal = ", ".join(f"{state} = true" for state in sorted(TERMINAL))
    return (
        f"local MOVES = {{{moves}}}\n"
        f"local TERMINAL = {{{terminal}}}\n"
        f"local PRIORITY_CLASSES = {{{', '.join(map(str, PRIORITY_CLASSES))}}}\n"
        f"local ENDS_KEPT, AUDIT_KEPT = {ENDS_KEPT}, {AUDIT_KEPT}\n"
        f"local CONDEMNED_S, REMEMBERED_S = {CONDEMNED_S}, {REMEMBERED_S}\n"
        f"local LOST_S, LOST_IN_ALL = {LOST_S}, {LOST_IN_ALL}\n"
        f"local MAX_QUEUED, MAX_SPEC_BYTES, SUBMITS_PER_S, BURST_S = "
        f"{MAX_QUEUED}, {MAX_SPEC_BYTES}, {SUBMITS_PER_S}, {BURST_S}\n"
        f"local SLACK_S, CONFIRMED = {SLACK_S}, {CONFIRMED}\n"
        f"local PACE_SLICE_S, PACE_SLICES = {PACE_SLICE_S}, {PACE_SLICES}\n"
        f"local QUEUE_PREFIX = {_lua_string(QUEUE_PREFIX)}\n"
        f"local PRIORITY_SEPARATOR = {_lua_string(PRIORITY_SEPARATOR)}\n"
    )


@cache
def _file(name: str) -> str:
    return (files("overpaint_shared.ledger") / "lua" / f"{name}.lua").read_text(encoding="utf-8")


@cache
def _library() -> tuple[Definition, ...]:
    return definitions("\n".join([_constants(), *map(_file, LIBRARY)]))


@cache
def source(name: str) -> str:
    """The whole text of script `name`."""
    own = _file(name)
    return "\n".join([*needed(own, _library()), own])


@cache
def sha(name: str) -> str:
    """By what Redis knows script `name`."""
    return sha1(source(name).encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """Runs scripts on one client. All of them may be run twice: a lost reply is asked for again.

    A producer of a farm with users may run scripts but load none, so that it can run the ledger's alone.
    Workers and the metrics exporter load them (`load`, `keep`), also those of the producers of other
    versions.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client: Any = client
        self._may_load = True
        self._kept_at: float | None = None

    def run(self, name: str, *args: object) -> Any:
        """The reply of one script; None in `args` is sent as an empty string."""
        return self._loaded(lambda: self._client.evalsha(sha(name), 0, *_encoded(args)))

    def run_many(self, calls: Sequence[tuple[str, Sequence[object]]]) -> list[Any]:
        """The replies of many calls, each a script and its arguments, in one pipeline."""
        return self._loaded(lambda: self._pipelined(calls))

    def _pipelined(self, calls: Sequence[tuple[str, Sequence[object]]]) -> list[Any]:
        with self._client.pipeline(transaction=False) as pipe:
            for name, args in calls:
                pipe.evalsha(sha(name), 0, *_encoded(args))
            replies: list[Any] = pipe.execute()
            return replies

    def _loaded(self, call: Callable[[], T]) -> T:
        """What `call` returns, once Redis has its script. Raises NoScriptError if nobody loads it."""
        end = time.monotonic() + WAIT_S
        while True:
            try:
                return call()
            except NoScriptError:
                if time.monotonic() > end:
                    raise
            if not self.load():
                time.sleep(WAIT_STEP_S)

    def load(self) -> bool:
        """Give Redis the scripts that it lacks. False if this user may not."""
        if not self._may_load:
            return False
        try:
            missing = self._missing({sha(name): source(name) for name in NAMES})
            for text in missing:
                self._client.script_load(text)
        except NoPermissionError:
            self._may_load = False
            return False
        if missing:  # Redis has restarted
            with suppress(ResponseError):  # what is kept there may be damaged; it serves other versions only
                for text in self._missing(self._client.hgetall(KEPT)):
                    self._client.script_load(text)
        return True

    def _missing(self, texts: Mapping[str, str]) -> list[str]:
        there = self._client.script_exists(*texts) if texts else []
        return [text for text, known in zip(texts.values(), there, strict=True) if not known]

    def keep(self) -> None:
        """As `load`, for workers: leave a copy of the producers' scripts, so that workers of other versions
        load them too when Redis has lost its scripts in a restart.
        """
        self.load()
        now = time.time()
        if self._kept_at is None or now - self._kept_at > KEPT_AGAIN_S:
            self._kept_at = now
            with suppress(ResponseError):  # a full Redis; nothing depends on it today
                self._leave_copies(now)

    def _leave_copies(self, now: float) -> None:
        mine = {sha(name): source(name) for name in PRODUCERS}
        with self._client.pipeline(transaction=True) as pipe:
            pipe.hset(KEPT, mapping=mine)
            pipe.zadd(KEPT_SINCE, dict.fromkeys(mine, now))
            pipe.execute()
        if old := self._client.zrangebyscore(KEPT_SINCE, "-inf", now - KEPT_S):
            self._client.hdel(KEPT, *old)
            self._client.zrem(KEPT_SINCE, *old)


def _encoded(args: Iterable[object]) -> list[str | int | float]:
    return [_plain(arg) for arg in args]


def _plain(arg: object) -> str | int | float:
    if arg is None:
        return ""
    if isinstance(arg, str | int | float):
        return arg
    return json.dumps(arg, separators=(",", ":"))
