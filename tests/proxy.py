"""A proxy before a real S3 server that misbehaves as told: `with S3Proxy(url) as proxy: proxy.rule(HANG)`.

A rule may be for some requests only: `proxy.rule(HOLD, "PUT /bucket/named/")`. Each connection serves one
request. Rules may change at any time; what hangs or is held goes on when its rule is taken back.
"""

import re
import socket
import struct
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

PASS: Final = "pass"
HANG: Final = "hang"
"""Takes the request and never answers; the connection ends when the rule does."""
HOLD: Final = "hold"
"""Sends the request on when the rule ends, and not before."""
RESET: Final = "reset"
"""Takes the request and resets the connection."""
CUT: Final = "cut"
"""Sends half of the answer and ends the connection."""
SLOW: Final = "slow"
"""Sends the answer byte by byte, some sixty a second."""
Behaviour = str | int
"""One of these, or a status to answer with: 403, 500, 503, 507."""

_CODES = {403: "AccessDenied", 500: "InternalError", 503: "ServiceUnavailable", 507: "InsufficientStorage"}


class S3Proxy:
    """Listens on a port of its own, at `url`."""

    def __init__(self, upstream: str) -> None:
        address = urlsplit(upstream)
        self._upstream = (str(address.hostname), int(address.port or 80))
        self._behaviour: Behaviour = PASS
        self._only = ""
        self._changed = threading.Condition()
        self._closed = False
        self.requests: list[str] = []
        """The first line of each request, in order."""

    def __enter__(self) -> Self:
        self._server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._server.close()
        self.rule(PASS)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def rule(self, behaviour: Behaviour, only: str = "") -> None:
        """Behave so from now on, for requests whose first line matches `only`."""
        with self._changed:
            self._behaviour, self._only = behaviour, only
            self._changed.notify_all()

    def met(self, only: str) -> list[str]:
        """The requests so far whose first line matches."""
        return [line for line in self.requests if re.search(only, line)]

    def _now(self, line: str) -> Behaviour:
        return self._behaviour if re.search(self._only, line) else PASS

    def _accept(self) -> None:
        while not self._closed:
            with suppress(OSError):
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError, ValueError):
            head, body = _request(client)
            line = head.split(b"\r\n", 1)[0].decode()
            self.requests.append(line)
            behaviour = self._now(line)
            if behaviour in {HANG, HOLD}:
                with self._changed:
                    self._changed.wait_for(lambda: self._now(line) != behaviour)
                if behaviour == HANG:
                    return
            elif behaviour == RESET:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            elif isinstance(behaviour, int):
                client.sendall(_refusal(behaviour))
                return
            self._pass_on(client, head, body, behaviour)

    def _pass_on(self, client: socket.socket, head: bytes, body: bytes, behaviour: Behaviour) -> None:
        with socket.create_connection(self._upstream) as server:
            server.sendall(head + body)
            answer = b"".join(iter(lambda: server.recv(65_536), b""))
        if behaviour == CUT:
            answer = answer[: len(answer) // 2]
        if behaviour != SLOW:
            client.sendall(answer)
            return
        for at in range(len(answer)):
            client.sendall(answer[at : at + 1])
            threading.Event().wait(0.015)


def _request(client: socket.socket) -> tuple[bytes, bytes]:
    """The head, without what concerns this connection alone, and the body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(client)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not re.match(rb"(?i)(expect|connection):", line)]
    if re.search(rb"(?im)^expect:", head):
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    size = re.search(rb"(?im)^content-length: *(\d+)", head)
    while size and len(body) < int(size[1]):
        body += _more(client)
    return b"\r\n".join([*lines, b"Connection: close", b"", b""]), body


def _more(client: socket.socket) -> bytes:
    if not (data := client.recv(65_536)):
        raise ValueError("the client has gone")
    return data


def _refusal(status: int) -> bytes:
    code = _CODES.get(status, "InternalError")
    body = f"<Error><Code>{code}</Code><Message>told to answer so</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
