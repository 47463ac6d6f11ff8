"""How fast a worker makes steps, over the last half minute."""

import threading
import time
from collections import deque
from collections.abc import Callable

OVER_S = 30.0


class Speed:
    """Steps per second. Safe to share between threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._made: deque[tuple[float, int]] = deque()
        self._since: float | None = None

    def add(self, steps: int) -> None:
        """So many steps were made just now."""
        with self._lock:
            if self._since is None:
                self._since = self._clock()
            self._made.append((self._clock(), steps))
            self._forget()

    def per_s(self) -> float | None:
        """Steps per second; 0 where none was made lately, None before the first."""
        with self._lock:
            if self._since is None:
                return None
            self._forget()
            steps = sum(count for _, count in self._made)
            return steps / min(OVER_S, max(1.0, self._clock() - self._since))

    def _forget(self) -> None:
        while self._made and self._clock() - self._made[0][0] > OVER_S:
            self._made.popleft()
