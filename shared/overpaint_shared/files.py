"""Picture files that a job or a receipt names, which may be anybody's: read whole, or refused unread."""

import stat
from pathlib import Path

from overpaint_shared.errors import InputError


def read_picture_file(path: Path, max_bytes: int, field: str, *, smaller: str, found: str) -> bytes:
    """The bytes of a file, `max_bytes` at most.

    `field` is the place in the spec that names it. `smaller` and `found` say what to do where it is too
    large, and where it cannot be read.

    Raises:
        InputError: it is not there, no file (a pipe would wait for ever, a device never end), or too large.

    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is no file", field=field, value=str(path), fix="name a picture file")
        data = b""
        if status.st_size <= max_bytes:
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot read {path}: {why}", field=field, value=str(path), fix=found) from error
    size = max(status.st_size, len(data))  # it may be growing
    if size > max_bytes:
        raise InputError(
            f"{path} has {size} bytes; at most {max_bytes} are allowed",
            field=field,
            value=str(path),
            fix=smaller,
        )
    return data
