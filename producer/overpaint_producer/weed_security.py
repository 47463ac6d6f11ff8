"""SeaweedFS's own security: mutual TLS between its parts, and signed requests to its volumes.

    python -m overpaint_producer.weed_security FOLDER [UID:GID]

By default SeaweedFS's gRPC ports ask for no key, whatever `-disableHttp` says: whoever reaches one can read
every object and become an administrator. Its volumes give, change and delete an object by its number alone.
With the files that this module writes, both are refused. `weed -config_dir=FOLDER` reads them.

One key pair serves all parts: they run in one process, and nobody else is to be let in. The files are made
once per folder. Containers get them from this command line; UID:GID is then the user that runs `weed`.

`weed` says nothing of a certificate that it cannot read and serves everybody then. So the files are checked
as its user before each start, and a start is refused.
"""

import json
import os
import secrets
import shutil
import ssl
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

from overpaint_producer.private_files import write_private
from overpaint_shared.errors import OverpaintError, ServiceError

CONFIG: Final = "security.toml"
CERTIFICATE: Final = "grpc.crt"
KEY: Final = "grpc.key"
DAYS: Final = 3650
PARTS: Final = ("master", "volume", "filer", "s3", "admin", "worker", "client")
SIGNED: Final = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")


def write_security(folder: Path) -> None:
    """Write the three files into `folder`, unless they are there. Raises ServiceError: no openssl."""
    if (folder / CONFIG).exists():
        return
    _make_certificate(folder)
    # Last and at once: where this file is, the others are whole.
    write_private(folder / CONFIG, _config(folder))


def check_security(folder: Path) -> None:
    """Read the files as `weed` would. Raises ServiceError: this user cannot, or they are damaged."""
    path = folder / CONFIG
    try:
        grpc = tomllib.loads(path.read_text(encoding="utf-8"))["grpc"]
        for part in PARTS:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(grpc[part]["cert"], grpc[part]["key"])
            context.load_verify_locations(grpc["ca"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServiceError(
            f"The S3 server's keys cannot be used by the user {os.geteuid()}: "
            f"{path}: {type(error).__name__}: {error}. Its own ports would serve everybody without them.",
            fix=f"make {folder} readable by that user, or delete {CONFIG} there: new keys are made",
        ) from None


def _make_certificate(folder: Path) -> None:
    program = shutil.which("openssl")
    if program is None:
        raise ServiceError(
            "There is no `openssl` on this machine, which makes the keys of the S3 server.",
            fix="apt-get install openssl, or set OVERPAINT_S3_ENDPOINT_URL",
        )
    argv = [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    argv += ["-subj", "/CN=overpaint-s3", "-days", str(DAYS)]
    argv += ["-keyout", str(folder / KEY), "-out", str(folder / CERTIFICATE)]
    made = subprocess.run(argv, capture_output=True, text=True, check=False, umask=0o077)
    if made.returncode:
        raise ServiceError(f"`openssl` made no keys for the S3 server: {made.stderr.strip()}")


def _config(folder: Path) -> str:
    certificate, key = (json.dumps(str(folder / name)) for name in (CERTIFICATE, KEY))  # as TOML writes it
    lines = [f'[{name}]\nkey = "{secrets.token_hex(32)}"' for name in SIGNED]
    lines += [f"[grpc]\nca = {certificate}"]
    lines += [f"[grpc.{part}]\ncert = {certificate}\nkey = {key}" for part in PARTS]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Write the files; with UID:GID, and as root, give them to that user. Returns the exit status.

    Fails unless whoever runs `weed` can use them.
    """
    folder = Path(argv[1])
    try:
        write_security(folder)
        if len(argv) > 2 and os.geteuid() == 0:  # nobody else may give files away
            return _give(folder, *map(int, argv[2].split(":")))
        check_security(folder)
    except (OverpaintError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _give(folder: Path, uid: int, gid: int) -> int:
    """Give the files to a user, and check them in a process that has become that user."""
    for name in (CONFIG, CERTIFICATE, KEY):
        os.chown(folder / name, uid, gid)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
        check_security(folder)
        status = 0
    except (OverpaintError, OSError) as error:
        print(error, file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
