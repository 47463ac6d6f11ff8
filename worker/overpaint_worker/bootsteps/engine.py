"""Starts the engine after Celery's pool and before its consumer; ends it before the pool.

Celery's own stop (`control shutdown`, a broken consumer) comes here without a drain, so `stop` gives jobs
back too.
"""

import os
import threading
from typing import Any, ClassVar

from celery import bootsteps
from celery.worker import state as celery_state

from overpaint_worker.node import Node

LEAVE_S = 3.0


class EngineStep(bootsteps.StartStopStep):
    """The engine, the leases and the signals of a worker."""

    requires = ("celery.worker.components:Pool",)
    node: ClassVar[Node]

    def start(self, parent: Any) -> None:  # noqa: ARG002  # Celery's signature
        """Start, without waiting for the engine: pings are answered while torch is imported."""
        self.node.start()

    def stop(self, parent: Any) -> None:  # noqa: ARG002
        """Give back what still runs, then leave, if need be without the threads that hang in a download."""
        last_resort = threading.Timer(LEAVE_S, os._exit, [celery_state.should_stop or 0])
        last_resort.daemon = True
        last_resort.start()
        self.node.close()

    terminate = stop
