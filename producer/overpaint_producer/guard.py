"""Becomes another program that ends with its parent: `python guard.py PARENT-PID SIGNAL PROGRAM ARGUMENT...`.

A farm's servers must not outlive the `overpaint up` that started them, however it died. Linux can send a
signal to a child when its parent ends, but the child has to ask for it, between fork and exec. Python's
`preexec_fn` runs there, yet may deadlock where threads exist (and warns from 3.12 on); a program of its own
can do neither. This one is replaced by PROGRAM at once, so that PROGRAM has its process id.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Ask to be sent SIGNAL, a number, at the parent's end, then become PROGRAM. argv as `sys.argv`."""
    parent, last, program = int(argv[1]), int(argv[2]), argv[3:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, last)
    if os.getppid() != parent:  # it ended before we asked
        sys.exit(0)
    os.execvp(program[0], program)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main(sys.argv)
