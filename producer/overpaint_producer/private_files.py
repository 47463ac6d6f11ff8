"""Files of a farm on this machine that only its owner reads: passwords, keys, logs."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Final

LOG_BYTES: Final = 16 << 20


def private_folder(folder: Path) -> Path:
    """Make a folder that only its owner enters; an older one with more rights loses them."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(PermissionError):  # some file systems know no rights
        folder.chmod(0o700)
    return folder


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads, never partly written."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(
        os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as out:
        out.write(text)
    partial.replace(path)


def open_private_log(path: Path) -> int:
    """Open a log to be continued, as a descriptor to close; one that others could read is closed to them.

    A long one is set aside as NAME.1, in place of the one before.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.stat(follow_symlinks=False).st_size > LOG_BYTES:
            path.replace(path.with_name(path.name + ".1"))
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with contextlib.suppress(PermissionError):
        os.fchmod(handle, 0o600)
    return handle


def shorten_private_log(path: Path) -> None:
    """Set a long log aside as NAME.1 while its writers go on; they must append (`open_private_log`).

    What they write in the moment between is lost. Raises OSError: there is no room for the copy.
    """
    if path.stat(follow_symlinks=False).st_size <= LOG_BYTES:
        return
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with path.open("rb") as log, os.fdopen(open_private_log(partial), "wb") as copy:
            shutil.copyfileobj(log, copy)
        partial.replace(path.with_name(path.name + ".1"))
    finally:
        partial.unlink(missing_ok=True)
    os.truncate(path, 0)
