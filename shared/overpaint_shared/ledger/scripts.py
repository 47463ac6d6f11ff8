"""The Lua scripts: read from their files, given the tables they share with Python, run by their SHA.

Every script is the constants below, then `guard.lua` and `prelude.lua`, then its own file.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Final

import redis
from redis.commands.core import Script
from redis.exceptions import NoScriptError

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

NAMES: Final = (
    "submit",
    "condemn",
    "deleted",
    "claim",
    "renew",
    "finish",
    "release",
    "cancel",
    "replay",
    "expire",
    "tend",
    "fail",
    "unserved",
    "sweep",
    "scrub",
    "announce",
)


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
        f"local CONDEMNED_S, REMEMBERED_S = {CONDEMNED_S}, {REMEMBERED_S}\n"
        f"local SLACK_S, CONFIRMED = {SLACK_S}, {CONFIRMED}\n"
        f"local PACE_SLICE_S, PACE_SLICES = {PACE_SLICE_S}, {PACE_SLICES}\n"
        f"local QUEUE_PREFIX = {_lua_string(QUEUE_PREFIX)}\n"
        f"local PRIORITY_SEPARATOR = {_lua_string(PRIORITY_SEPARATOR)}\n"
    )


@cache
def source(name: str) -> str:
    """The whole text of script `name`."""
    folder = files("overpaint_shared.ledger") / "lua"
    return "\n".join(
        [
            _constants(),
            *((folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("guard", "prelude", name)),
        ]
    )


class Scripts:
    """Runs scripts on one client. All of them may be run twice: a lost reply is asked for again."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._scripts: dict[str, Script] = {name: client.register_script(source(name)) for name in NAMES}

    def run(self, name: str, *args: object) -> Any:
        """The reply of one script; None in `args` is sent as an empty string."""
        return self._scripts[name](args=_encoded(args))

    def run_many(self, name: str, calls: Sequence[Sequence[object]]) -> list[Any]:
        """The replies of one script for many argument lists, in one pipeline."""
        if len(calls) == 1:  # saves the pipeline's check of the script
            return [self.run(name, *calls[0])]
        try:
            return self._pipelined(name, calls)
        except NoScriptError:  # Redis restarted between the pipeline's check and its run
            return self._pipelined(name, calls)

    def _pipelined(self, name: str, calls: Sequence[Sequence[object]]) -> list[Any]:
        with self._client.pipeline(transaction=False) as pipe:
            for args in calls:
                self._scripts[name](args=_encoded(args), client=pipe)
            return pipe.execute()


def _encoded(args: Iterable[object]) -> list[str | int | float]:
    return [_plain(arg) for arg in args]


def _plain(arg: object) -> str | int | float:
    if arg is None:
        return ""
    if isinstance(arg, str | int | float):
        return arg
    return json.dumps(arg, separators=(",", ":"))
