"""A Redis that speaks TLS, for tests: Debian's, taken apart into `.venv`. Valkey's wheel has no TLS."""

import os
import subprocess
import sys
from pathlib import Path

from tests.compose import ROOT

PLACE = Path(sys.prefix) / "redis-tls-programs"
PROGRAMS = ("redis-server", "redis-cli")


def tls_redis() -> Path:
    """The folder with `redis-server` and `redis-cli`. Fails where they cannot be had."""
    done = subprocess.run(
        [ROOT / "deploy" / "debian.sh", "--libraries", "redis-tls", "redis-server", "redis-tools"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    PLACE.mkdir(exist_ok=True)
    for program in PROGRAMS:
        _wrap(program, Path(done.stdout.strip()) / "usr")
    return PLACE


def _wrap(program: str, unpacked: Path) -> None:
    """A program that finds the libraries which were fetched with it."""
    libraries = {str(path.parent) for path in unpacked.rglob("*.so*")}
    wrapper = PLACE / f"{program}.{os.getpid()}"
    wrapper.write_text(
        f'#!/bin/sh\nLD_LIBRARY_PATH={os.pathsep.join(libraries)} exec {unpacked}/bin/{program} "$@"\n'
    )
    wrapper.chmod(0o755)
    wrapper.replace(PLACE / program)
