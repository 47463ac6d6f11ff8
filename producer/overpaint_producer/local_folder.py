"""The folder of a farm on this machine: who runs there, and the settings by which other commands find it."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from overpaint_producer.private_files import write_private
from overpaint_shared.errors import SettingsError

CONFIG: Final = "farm.toml"
LOCK: Final = "up.lock"

SHARED: Final = (
    "redis_url",
    "s3_endpoint_url",
    "s3_public_url",
    "s3_bucket",
    "s3_access_key",
    "s3_secret_key",
    "s3_region",
    "s3_checksums",
    "s3_ca_file",
    "owner",
)
"""The settings that `farm.toml` hands on to the other commands."""


def clear(data: Path) -> None:
    """Remove the settings of a farm that ran there and was killed: they would be taken for the user's own.

    Raises SettingsError: a farm runs there.
    """
    config = data / CONFIG
    if config.exists():
        held = lock(data / LOCK)
        config.unlink()
        os.close(held)


def lock(path: Path) -> int:
    """Take the folder, as a descriptor to close; the lock ends with the process. Raises SettingsError."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 32).decode(errors="replace").strip()
        os.close(handle)
        raise SettingsError(
            f"a farm runs in {path.parent} already (process {owner})",
            field="--data",
            value=str(path.parent),
            fix="use that one, stop it with Ctrl-C, or run this in another folder",
        ) from None
    os.truncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    return handle


def write_config(path: Path, values: Mapping[str, object]) -> None:
    """Write the settings of a farm that runs, secrets among them; None is left out."""
    lines = ["# Written by `overpaint up` for the commands in this folder; gone when it stops."]
    # JSON's strings are TOML's, but for its way to escape what is beyond sixteen bits.
    lines += [
        f"{name} = {json.dumps(_plain(value), ensure_ascii=False)}"
        for name, value in values.items()
        if value is not None
    ]
    write_private(path, "\n".join(lines) + "\n")


def _plain(value: object) -> str:
    reveal = getattr(value, "get_secret_value", None)
    return str(reveal() if reveal else value)
