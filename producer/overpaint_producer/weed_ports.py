"""Whether SeaweedFS's own gRPC ports let strangers in.

`weed` serves them without TLS, and says so nowhere, when it cannot read its certificate. So they are tried.
"""

import json
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

CONNECT_S: Final = 1.5
DEFAULT_GRPC: Final = (18888, 19333, 19340, 33646)
"""Filer, master, volume and admin of `weed mini`."""
S3_GRPC_OFFSET: Final = 10_000
"""Between the S3 port and its gRPC port, unless options say otherwise."""
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
_SETTINGS: Final = b"\x04"
"""The type of HTTP/2's first frame."""


def open_to_strangers(host: str, ports: Iterable[int]) -> tuple[int, ...]:
    """Those of the ports that speak gRPC with whoever calls, without a certificate."""
    asked = sorted(set(ports))
    with ThreadPoolExecutor(max_workers=8) as pool:
        open_ones = pool.map(lambda port: _answers(host, port, None) or _answers(host, port, _tls()), asked)
        return tuple(port for port, is_open in zip(asked, open_ones, strict=True) if is_open)


def grpc_ports(s3_port: int, memory: Path) -> tuple[int, ...]:
    """Where the server's gRPC ports are. `memory`: the ports of a local farm, which may be another one's."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        ports = json.loads(memory.read_text())
        if ports.get("s3.port") == s3_port:
            return tuple(int(port) for name, port in ports.items() if name.endswith(".grpc"))
    beside = s3_port + S3_GRPC_OFFSET
    return (*DEFAULT_GRPC, *([beside] if beside < 1 << 16 else []))


def _tls() -> ssl.SSLContext:
    """TLS with a server whoever it is, and without a certificate of our own: nothing is told to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _answers(host: str, port: int, tls: ssl.SSLContext | None) -> bool:
    with (
        suppress(OSError),
        socket.create_connection((host, port), timeout=CONNECT_S) as plain,
        tls.wrap_socket(plain) if tls else plain as connection,
    ):
        connection.sendall(_PREFACE)
        return connection.recv(9)[3:4] == _SETTINGS
    return False
