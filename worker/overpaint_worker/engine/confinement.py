"""What Linux takes away from a process that asks for it: other programs, networks, further processes."""

from __future__ import annotations

import ctypes
import platform
import signal
import struct
from typing import Final

_PDEATHSIG, _NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 1, 38, 22, 2
_REFUSED: Final = {
    "x86_64": (0xC000003E, (41, 42, 49, 50, 53, 56, 57, 58, 59, 62, 101, 310, 311, 322, 435)),
    "aarch64": (0xC00000B7, (198, 199, 200, 201, 203, 220, 221, 117, 129, 270, 271, 281, 435)),
}
"""By machine: how the kernel calls it, and the numbers of these calls, of those that it has.

socket, connect, bind, listen, socketpair, clone, fork, vfork, execve, kill, ptrace, process_vm_readv,
process_vm_writev, execveat, clone3.
"""
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _NOT_PERMITTED = 0x7FFF0000, 0x00050001


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine() -> bool:
    """Take them away from this process, and have it end with its parent. False where the kernel does not."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        program = _program(platform.machine())
        if program is None or libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            return False
        given = _Program(len(program) // 8, program)
        return not libc.prctl(_SECCOMP, _FILTER, ctypes.byref(given), 0, 0)
    except (OSError, AttributeError):  # no such library or call: another system than Linux
        return False


def _program(machine: str) -> bytes | None:
    """A filter of system calls: those that are refused fail, all others pass."""
    if machine not in _REFUSED:
        return None
    architecture, refused = _REFUSED[machine]
    steps = [
        (_LOAD, 0, 0, 4),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _NOT_PERMITTED),
        (_LOAD, 0, 0, 0),
    ]
    for left, number in zip(range(len(refused), 0, -1), refused, strict=True):
        steps.append((_IF_EQUAL, left, 0, number))
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _NOT_PERMITTED)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
