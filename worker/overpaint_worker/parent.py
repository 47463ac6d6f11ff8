"""A process that ends with the one that started it, however that ended.

The end of a pipe tells a process only while it can read. One that hangs in a driver cannot, and would keep
its device. Linux can send a signal instead. It does so when the *thread* that started the process ends.
"""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(last: signal.Signals) -> None:
    """Be sent `last` when the thread that started this process ends. Does nothing but on Linux."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(last))
