"""A producer that dies in the middle of a submit: `python -m tests.chaos.cut JSON`.

JSON: `{"spec": ..., "token": ..., "when": "uploaded" | "recorded"}`. Its settings come from the environment.
"""

import json
import os
import signal
import sys
from typing import Any, NoReturn

from overpaint_producer import submitting
from overpaint_producer.client import Farm
from overpaint_shared.ledger import Ledger
from overpaint_shared.settings import Settings


def die(*_: object, **__: object) -> NoReturn:
    """As a machine that loses its power."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def main(asked: dict[str, Any]) -> None:
    """Submit until then."""
    if asked["when"] == "uploaded":
        Ledger.submit = die  # type: ignore[method-assign]
    else:
        submitting.wake = die
    with Farm(Settings.load()) as farm:
        farm.submit(asked["spec"], token=asked["token"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
