"""The audit trail: who submitted, cancelled, replayed, discarded and fetched which jobs, and how that ended.

The scripts write it (`note.lua`): a line for each call, in `op:audit:producer` for those who have a
producer's rights in Redis, else in `op:audit`. A line that cannot be written is logged, and never fails its
call.
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, Final

import redis
from redis.exceptions import NoPermissionError

from overpaint_shared import __version__
from overpaint_shared.errors import LedgerUnreachable
from overpaint_shared.ledger.scripts import Scripts
from overpaint_shared.ledger.tolerance import json_object, tolerated

PRODUCERS: Final = "op:audit:producer"
"""A line here counts as a producer's, whatever it says: producers can write to no other list."""
KEYS: Final = ("op:audit", PRODUCERS)
ACTIONS: Final = ("submit", "cancel", "replay", "discard", "get", "links")
LEFT: Final = -1
"""What `audit.lua` answers when it leaves the line to the caller."""
_LONGEST_WORD: Final = 60
_LATEST: Final = 10.0**11
_CHUNK: Final = 1000

Client = Any  # as in listing.py
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditLine:
    """One call, as the trail has it. All but `rights` and which jobs changed is what the client says."""

    at: float
    """Unix seconds, by the clock of Redis."""
    action: str
    """One of `ACTIONS`."""
    result: str
    """`ok`, or the code of the error that the call ended with."""
    rights: str
    """producer, worker or operator: what the Redis user of the call may do."""
    owner: str
    """Whose jobs these are; empty where they have several owners, or no record."""
    group: str
    name: str
    """The name (`output.key`) of the picture that was fetched."""
    jobs: int
    changed: int
    """How many of the jobs the call made or moved."""
    ids: tuple[str, ...]
    """The first of them."""
    os_user: str
    host: str
    program: str
    acts_for: str
    """The owner in the settings of the program."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Trail:
    """What was found."""

    lines: tuple[AuditLine, ...]
    """Newest last."""
    unreadable: int = 0
    """How many entries of the trail are no lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditFilter:
    """Which lines are wanted; None: all."""

    since: float | None = None
    owner: str | None = None
    action: str | None = None

    def wants(self, line: AuditLine) -> bool:
        """Whether the line is one of them."""
        return (
            (self.since is None or line.at >= self.since)
            and self.owner in (None, line.owner)
            and self.action in (None, line.action)
        )


def caller(acts_for: str | None) -> str:
    """Who this program is, as it says itself; JSON, short, without control characters."""
    program = f"{PurePath(sys.argv[0] or 'python').name} {__version__}"
    words = {"os_user": _os_user(), "host": socket.gethostname(), "program": program, "as": acts_for or ""}
    return json.dumps({name: _word(text) for name, text in words.items()}, ensure_ascii=False)


def _word(text: str) -> str:
    return "".join(sign for sign in text if sign.isprintable())[:_LONGEST_WORD]


def _os_user() -> str:
    try:
        import pwd
    except ImportError:  # Windows
        return os.environ.get("USERNAME", "")
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user without a name
        return str(os.getuid())


class Auditor:
    """Writes lines for a program."""

    def __init__(self, scripts: Scripts, acts_for: str | None) -> None:
        self._scripts = scripts
        self.who: Final = caller(acts_for)
        self._warned = False

    def submits(self, ids: Sequence[str], owner: str, group: str) -> tuple[str, list[object]]:
        """A call for the pipeline of submits: it leaves the line to `note` unless all jobs have a record."""
        return "audit", ["submit", self.who, owner, group, "", "ok", len(ids), "made", *ids]

    def note(
        self,
        action: str,
        ids: Sequence[str],
        *,
        owner: str = "",
        group: str = "",
        name: str = "",
        result: str = "ok",
        changed: int = 0,
    ) -> None:
        """Write the line of a call."""
        args = [action, self.who, owner, group, name, result, changed, "", *ids]
        try:
            noted = self._scripts.run("audit", *args)
        except redis.RedisError as error:
            self._warn(str(error))
        else:
            self.told(action, len(ids), noted, result)

    def told(self, action: str, jobs: int, noted: object, result: str = "ok") -> None:
        """Log a call; a script has written its line, unless `noted` is not 1."""
        log.info(
            "%s of %d jobs: %s", action, jobs, result,
            extra={"action": f"audit.{action}", "jobs": jobs, "result": result},
        )  # fmt: skip
        if noted != 1:
            self._warn("its Redis user may not, or the trail is full and no worker shortens it")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("calls are not in the audit trail: %s", why, extra={"action": "audit.unwritten"})


def trail(client: Client, where: str, wanted: AuditFilter, limit: int) -> Trail:
    """The newest `limit` lines that are wanted.

    Raises LedgerUnreachable for a user that may not read them.
    """
    lines: list[AuditLine] = []
    unreadable = 0
    try:
        for key in KEYS:
            found, odd = _newest(client, key, wanted, limit)
            lines += found
            unreadable += odd
    except NoPermissionError as error:
        raise LedgerUnreachable(
            f"Redis at {where} does not let this user read the audit trail",
            field="redis_url",
            value=where,
            fix="ask as the Redis user operator: --redis-url redis://operator:PASSWORD@HOST:PORT/0",
        ) from error
    lines.sort(key=lambda line: line.at)
    return Trail(tuple(lines[-limit:]), unreadable)


def _newest(client: Client, key: str, wanted: AuditFilter, limit: int) -> tuple[list[AuditLine], int]:
    """Lines of one list, newest first, and how many entries could not be read before there were enough."""
    found: list[AuditLine] = []
    unreadable = 0
    end, chunk = int(tolerated(client.llen, key) or 0), _CHUNK
    while end > 0 and len(found) < limit:
        start = max(0, end - chunk)
        try:
            texts = tolerated(client.lrange, key, start, end - 1) or ()
        except (redis.ConnectionError, redis.TimeoutError):
            # Redis closes a connection whose answer is too long; a producer may have written long entries.
            client.ping()  # raises where Redis is away
            if chunk == 1:
                unreadable, end = unreadable + 1, start
            chunk = max(1, chunk // 2)
            continue
        for text in reversed(texts):
            line = parse(text, key)
            unreadable += line is None
            if line is not None and wanted.wants(line):
                found.append(line)
        end = start
    return found[:limit], unreadable


def parse(text: str, key: str) -> AuditLine | None:
    """The line that an entry of a list holds; None for anything else: who may append may append anything."""
    entry = json_object(text)
    at = entry.get("at") if entry is not None else None
    if entry is None or isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at < _LATEST:
        return None
    who = json_object(_text(entry, "who")) or {}
    ids = entry.get("ids")
    return AuditLine(
        at=float(at),
        action=_text(entry, "action"),
        result=_text(entry, "result"),
        rights="producer" if key == PRODUCERS else _text(entry, "rights"),
        owner=_text(entry, "owner"),
        group=_text(entry, "group"),
        name=_text(entry, "name"),
        jobs=_count(entry, "jobs"),
        changed=_count(entry, "changed"),
        ids=tuple(filter(None, map(str, ids))) if isinstance(ids, list) else (),
        os_user=_text(who, "os_user"),
        host=_text(who, "host"),
        program=_text(who, "program"),
        acts_for=_text(who, "as"),
    )


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    return value if isinstance(value, str) else ""


def _count(entry: Mapping[str, Any], name: str) -> int:
    value = entry.get(name)
    return int(value) if isinstance(value, int | float) and 0 <= value < _LATEST else 0
