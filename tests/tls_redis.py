"""A Redis that speaks TLS, for tests: Debian's, unpacked into `.venv`. Valkey's wheel has no TLS."""

import os
import subprocess
import sys
from pathlib import Path

PACKAGES = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1")
PLACE = Path(sys.prefix) / "tls-redis"


def tls_redis() -> Path:
    """The folder with `redis-server` and `redis-cli`. Fails where they cannot be had."""
    if not (PLACE / "redis-cli").exists():
        _unpack(PLACE / "packages")
        for program in ("redis-server", "redis-cli"):
            _wrap(program)
    return PLACE


def _unpack(folder: Path) -> None:
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # Lists of its own, since a machine's may be missing or old.
    options = ["Acquire::Retries=3", "APT::Sandbox::User=root"]
    options += [f"Dir::State::Lists={folder}/lists", f"Dir::Cache={folder}/cache"]
    apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder / "unpacked"], check=True)


def _wrap(program: str) -> None:
    unpacked = PLACE / "packages" / "unpacked" / "usr"
    libraries = os.pathsep.join(str(path.parent) for path in unpacked.rglob("liblzf.so.1"))
    wrapper = PLACE / f"{program}.next"
    wrapper.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {unpacked}/bin/{program} "$@"\n')
    wrapper.chmod(0o755)
    wrapper.replace(PLACE / program)
