"""What an engine writes to standard error: passed on as it comes; its end is kept to tell why it died."""

import os
import re
import threading
from contextlib import suppress
from typing import IO, Final

from overpaint_shared.errors import visible
from overpaint_worker.logs import masked

KEPT_BYTES: Final = 4096
"""Of the end of the output."""
LINE_CHARACTERS: Final = 400
STANDARD_ERROR: Final = 2
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_ASSIGNED = re.compile(
    r"""((?:password|passwd|secret|credential|access_key|api_key)\w{0,40}["']?[ \t]?[=:][ \t]?)\S+""",
    re.IGNORECASE,
)


class EngineOutput:
    """Reads the pipe of one engine in a thread of its own, until its end."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._end = b""
        self._thread = threading.Thread(target=self._read, name="engine-output", daemon=True)
        self._thread.start()

    def drain(self, within_s: float) -> None:
        """Wait for the end: a child of the engine may hold the pipe open."""
        self._thread.join(within_s)

    def last_words(self) -> str:
        """The last lines, without secrets and without what moves a terminal's cursor."""
        return readable(self._end)

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            while data := os.read(self._pipe.fileno(), 65_536):
                self._end = (self._end + data)[-KEPT_BYTES:]
                _pass_on(data)
        self._pipe.close()


def _pass_on(data: bytes) -> None:
    with suppress(OSError):  # nobody reads ours: the engine must not wait for that
        while data:
            data = data[os.write(STANDARD_ERROR, data) :]


def readable(end: bytes) -> str:
    """The lines that a piece of output ends with; the first, which may be cut, is left out if it is."""
    text = end[-KEPT_BYTES:].decode("utf-8", errors="replace")
    if len(end) >= KEPT_BYTES:
        text = text.partition("\n")[2] or text
    text = _ASSIGNED.sub(r"\1***", masked(_COLOURS.sub("", text)))
    lines = [visible(line)[:LINE_CHARACTERS] for line in text.splitlines() if line.strip()]
    return "\n".join(lines)[-KEPT_BYTES:]
