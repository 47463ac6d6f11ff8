"""Which queue the next message is taken from: one model at a time, and none when the worker is full.

Celery asks `ModelCycle` before each BRPOP; the rules are `Intake`'s. One hook thus gives affinity (a model's
jobs
meet in a batch), back-pressure (no more messages than the engine has credits for) and draining.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from kombu.utils.scheduling import priority_cycle

SWITCH_AFTER_S = 30.0


if TYPE_CHECKING:
    _PriorityCycle = priority_cycle[Any]
else:
    _PriorityCycle = priority_cycle


class Intake:
    """Whether the worker takes messages, and of which model.

    `choose` and `taken` are called in Celery's main thread only; the attributes are set from other threads,
    each by
    a single assignment.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        *,
        slots: int,
        held: Callable[[], int],
        switch_after_s: float = SWITCH_AFTER_S,
        store_away: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`models` maps queue names to models; `held` counts the messages that this worker has and has not
        ended. `store_away`: S3 is away, or too much waits for it, so what were taken now could not be
        rendered.
        """
        self.models = dict(models)
        self.engine_up = False
        self.draining = False
        self.store_away = store_away
        self.credits = slots
        self.waiting: Mapping[str, float] = {}
        """Seconds that the oldest waiting job of each model has waited, as last seen."""
        self.open_queue: str | None = None
        self._slots = slots
        self._held = held
        self._switch_after_s = switch_after_s
        self._clock = clock
        self._since = clock()

    @property
    def closed(self) -> bool:
        """Nothing may be taken: the worker drains, its engine is not up, or S3 is away."""
        return self.draining or self.store_away() or not self.engine_up

    @property
    def room(self) -> int:
        """How many messages more it may hold."""
        return max(0, min(self._slots, max(1, self.credits)) - self._held())

    def choose(self, queues: Sequence[str]) -> list[str]:
        """The queues to ask next, in order. Queues that are no model's, such as reply queues, always pass."""
        others = [q for q in queues if q not in self.models]
        return others + self._choose_models([q for q in queues if q in self.models])

    def taken(self, queue: str) -> None:
        """A message came from this queue. The first one of an idle worker opens its model."""
        if not self._held():
            self.open_queue = queue
            self._since = self._clock()

    def _choose_models(self, queues: list[str]) -> list[str]:
        if self.closed or not self.room:
            return []
        late = self._late(queues)
        if not self._held():  # idle: any model, the open one first, or last when another's turn has come
            queues = sorted(queues, key=self._waited, reverse=True)  # or two busy models would starve a third
            return sorted(queues, key=lambda q: (q == self.open_queue) if late else (q != self.open_queue))
        return [] if late else [q for q in queues if q == self.open_queue]  # late: drain, then switch

    def _late(self, queues: list[str]) -> bool:
        """Another model's oldest job has waited long enough, and the open model has had its time."""
        if self._clock() - self._since < self._switch_after_s:
            return False
        waited = (self._waited(q) for q in queues if q != self.open_queue)
        return max(waited, default=0.0) >= self._switch_after_s

    def _waited(self, queue: str) -> float:
        return self.waiting.get(self.models[queue], 0.0)


class ModelCycle(_PriorityCycle):
    """kombu's order of queues, decided by the worker's `Intake`. Named in `queue_order_strategy`."""

    intake: ClassVar[Intake | None] = None
    """Set once at start: kombu makes the cycle itself, by name and without arguments."""

    def consume(self, n: int) -> list[str]:  # type: ignore[override]  # the published types are older
        """The queues for the next BRPOP, of the `n` that are active."""
        queues: list[str] = list(self.items or ())[:n]
        return self.intake.choose(queues) if self.intake else queues


STRATEGY = f"{__name__}:{ModelCycle.__name__}"
