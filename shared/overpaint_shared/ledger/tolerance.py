"""Reading what may be damaged: a key of another type, a field that is no number, text that is no JSON.

What cannot be used reads as None, so that it costs nobody else an answer; the reaper puts it aside.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from redis.exceptions import ResponseError

_DEEPEST: Final = 100


def is_wrong_type(error: object) -> bool:
    """Whether Redis refused because the key holds another kind of value."""
    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


def tolerated(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The reply; None where the key is of another type."""
    try:
        return call(*args, **options)
    except ResponseError as error:
        if is_wrong_type(error):
            return None
        raise


def answers(pipe: Any) -> list[Any]:
    """The replies of a pipeline, None for each key of another type; any other error is raised."""
    replies: list[Any] = pipe.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    return [None if isinstance(reply, Exception) else reply for reply in replies]


def number(text: str | None) -> float | None:
    """The finite number that a text holds."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def json_object(text: str | None) -> Mapping[str, Any] | None:
    """The JSON object that a text holds, if it is nested no deeper than any of ours."""
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _is_shallow(value) else None


def _is_shallow(value: object) -> bool:
    """Whether a JSON value can be copied and written without too deep a recursion."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return True
    return False


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
