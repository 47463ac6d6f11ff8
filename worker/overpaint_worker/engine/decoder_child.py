"""A process that decodes pictures and nothing else: `python -m overpaint_worker.engine.decoder_child FD`.

A stranger's file may hang or crash a decoder, or have it fill the memory. Here that ends this process, and so
the one job whose picture it was. It has limits of time and memory, no secrets, and where Linux lets it no
way to a network or to another process, and no file that it could write.

    request: 4 bytes of length, JSON, the file        answer: 4 bytes of length, JSON, the profile
    and with an answer that holds samples a descriptor of the memory that they lie in
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import socket
import struct
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from overpaint_shared.errors import OverpaintError
from overpaint_shared.setting_views import Limits
from overpaint_worker.engine import colour
from overpaint_worker.engine.confinement import confine
from overpaint_worker.engine.decoding import Decoded, decode

CPU_S: Final = 30
"""Of this process's own time, for one picture. The largest that is allowed takes a few seconds."""
MOST_MEMORY: Final = 4 * 2**30
MOST_FILES: Final = 32

ANY: Final = 2**32
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
"""What the engine reads of a picture cannot be cut or changed any more."""

_LENGTHS: Final = struct.Struct(">II")


def send(pipe: socket.socket, head: dict[str, Any], body: bytes, descriptors: list[int]) -> None:
    """One message."""
    packed = json.dumps(head).encode()
    socket.send_fds(pipe, [_LENGTHS.pack(len(packed), len(body))], descriptors)
    pipe.sendall(packed)
    pipe.sendall(body)


def receive(
    pipe: socket.socket, most: tuple[int, int] = (ANY, ANY), until: float | None = None
) -> tuple[dict[str, Any], bytes, list[int]]:
    """The next message, and descriptors to close. Raises EOFError at the end, TimeoutError, or ValueError:
    its parts have more than `most` bytes.
    """
    start, descriptors, _, _ = socket.recv_fds(pipe, _LENGTHS.size, 1)
    if not start:
        raise EOFError
    try:
        lengths = _LENGTHS.unpack(start + _exactly(pipe, _LENGTHS.size - len(start), until))
        if any(length > limit for length, limit in zip(lengths, most, strict=True)):
            raise ValueError(f"a message of {lengths} bytes")
        head, body = (_exactly(pipe, length, until) for length in lengths)
        return json.loads(head), body, descriptors
    except BaseException:
        for each in descriptors:
            os.close(each)
        raise


def _exactly(pipe: socket.socket, length: int, until: float | None) -> bytes:
    found = bytearray(length)
    view = memoryview(found)
    while view:
        if until is not None:
            pipe.settimeout(max(0.001, until - time.monotonic()))
        count = pipe.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(found)


def request(data: bytes, limits: Limits, field: str, **how: bool) -> tuple[dict[str, Any], bytes]:
    """What asks for a picture."""
    return {"limits": asdict(limits), "field": field, "how": how}, data


def serve(pipe: socket.socket) -> None:
    """Decode until the other end is closed."""
    while True:
        try:
            head, data, _ = receive(pipe)
        except EOFError:
            return
        _allow(CPU_S)
        try:
            decoded = decode(data, Limits(**head["limits"]), head["field"], **head["how"])
        except OverpaintError as error:
            send(pipe, {"error": error.to_json()}, b"", [])
        else:
            _answer(pipe, decoded)


def _answer(pipe: socket.socket, decoded: Decoded) -> None:
    if decoded.icc is not None:
        with suppress(colour.ProfileError):
            colour.read(decoded.icc)  # what crashes its reader does so here
    samples = np.ascontiguousarray(decoded.samples)
    memory = os.memfd_create("picture", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(samples.data)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
        about = {"shape": samples.shape, "dtype": str(samples.dtype), "notes": decoded.notes}
        send(pipe, about | {"icc": decoded.icc is not None}, decoded.icc or b"", [memory])
    finally:
        os.close(memory)


def _allow(seconds: int) -> None:
    """So much more time; the kernel ends this process after it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds, hard))


def main() -> None:
    """The process's whole life."""
    for what, most in (
        (resource.RLIMIT_AS, MOST_MEMORY),
        (resource.RLIMIT_NOFILE, MOST_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    confine()
    with socket.socket(fileno=int(sys.argv[1])) as pipe:
        serve(pipe)


if __name__ == "__main__":
    main()
