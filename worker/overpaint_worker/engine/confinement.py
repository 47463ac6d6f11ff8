"""What Linux takes away from a process that asks for it: other processes, networks, files to write.

A filter of system calls refuses what starts, signals, reads or slows another process, and what opens a
network. Landlock refuses to write files, and to look into other processes by /proc, where their secrets are.
Root's other rights are dropped, for some of them would still allow that.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from typing import Final

_PDEATHSIG, _NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 1, 38, 22, 2
_REFUSED: Final = {
    "x86_64": (
        0xC000003E, 302,
        (
            41, 42, 49, 50, 53, 56, 57, 58, 59, 62, 101, 129, 141, 142, 144, 200, 203, 234, 251, 272, 297,
            298, 308, 310, 311, 314, 321, 322, 424, 425, 426, 427, 434, 435, 438, 440, 448,
        ),
    ),
    "aarch64": (
        0xC00000B7, 261,
        (
            198, 203, 200, 201, 199, 220, 221, 129, 117, 138, 140, 118, 119, 130, 122, 131, 30, 97, 240,
            241, 268, 270, 271, 274, 280, 281, 424, 425, 426, 427, 434, 435, 438, 440, 448,
        ),
    ),
}  # fmt: skip
"""By machine: how the kernel calls it, its number of prlimit64, and the numbers of these calls that it has.

socket, connect, bind, listen, socketpair, clone, fork, vfork, execve, kill, ptrace, rt_sigqueueinfo,
setpriority, sched_setparam, sched_setscheduler, tkill, sched_setaffinity, tgkill, ioprio_set, unshare,
rt_tgsigqueueinfo, perf_event_open, setns, process_vm_readv, process_vm_writev, sched_setattr, bpf, execveat,
pidfd_send_signal, io_uring_setup, io_uring_enter, io_uring_register, pidfd_open, clone3, pidfd_getfd,
process_madvise, process_mrelease.
"""
_X32: Final = 0x40000000
"""From here on x86-64 has the same calls once more, under other numbers."""
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _NOT_PERMITTED = 0x7FFF0000, 0x00050001
_MACHINE, _NUMBER, _FIRST_ARGUMENT = 4, 0, 16
"""Where these are in what the filter looks at."""

_CREATE_RULES, _RESTRICT_SELF, _ASK_VERSION = 444, 446, 1
_WRITES: Final = 0x1FF2
"""Write a file; remove or make a file, folder, device, socket, pipe or link."""
_TRUNCATES, _TRUNCATES_SINCE = 0x4000, 3

_CAPABILITIES_VERSION, _READ_FILES = 0x20080522, 4


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine() -> bool:
    """Take them away from this process, and have it end with its parent. False where the kernel does not."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            return False
        alone = _write_nothing(libc) and _be_nobody(libc)
        program = _program(platform.machine())
        if program is None:
            return False
        given = _Program(len(program) // 8, program)
        return not libc.prctl(_SECCOMP, _FILTER, ctypes.byref(given), 0, 0) and alone
    except (OSError, AttributeError):  # no such library or call: another system than Linux
        return False


def _write_nothing(libc: ctypes.CDLL) -> bool:
    """Have Landlock refuse each write to a file, and each look into a process without these rules."""
    version = libc.syscall(_CREATE_RULES, None, ctypes.c_size_t(0), _ASK_VERSION)
    if version < 1:
        return False
    handled = struct.pack("Q", _WRITES | (_TRUNCATES if version >= _TRUNCATES_SINCE else 0))
    rules = libc.syscall(_CREATE_RULES, handled, ctypes.c_size_t(len(handled)), 0)
    if rules < 0:
        return False
    try:
        return not libc.syscall(_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


def _be_nobody(libc: ctypes.CDLL) -> bool:
    """Drop what root may do, except to read files: its libraries may be another user's."""
    header, held = struct.pack("Ii", _CAPABILITIES_VERSION, 0), ctypes.create_string_buffer(24)
    if libc.capget(header, held):
        return False
    kept = struct.unpack("6I", held)[1] & _READ_FILES
    return not libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0))


def _program(machine: str) -> bytes | None:
    """A filter of system calls: those that are refused fail, all others pass."""
    if machine not in _REFUSED:
        return None
    architecture, limit, refused = _REFUSED[machine]
    steps = [
        (_LOAD, 0, 0, _MACHINE),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _NOT_PERMITTED),
        (_LOAD, 0, 0, _NUMBER),
    ]
    ends = [
        (_IF_EQUAL, 0, 2, limit),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_IF_EQUAL, 0, 1, 0),  # limits of its own
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _NOT_PERMITTED),
    ]
    checks = [(_IF_AT_LEAST, _X32), *((_IF_EQUAL, number) for number in refused)]
    for left, (check, number) in zip(range(len(checks), 0, -1), checks, strict=True):
        steps.append((check, left + len(ends) - 2, 0, number))
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, *ends])
