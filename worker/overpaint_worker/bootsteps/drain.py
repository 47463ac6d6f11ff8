"""Joins the drain, and all who free a slot, to Celery's event loop."""

from typing import Any, ClassVar

from celery import bootsteps

from overpaint_worker.node import Node


class DrainStep(bootsteps.StartStopStep):
    """Lets the event loop be woken. Celery starts it anew with each connection to the broker."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    node: ClassVar[Node]

    def start(self, parent: Any) -> None:
        """Watch for wake-ups."""
        self._timer = parent.timer.call_repeatedly(1.0, self.node.waker.wake)

    def register_with_event_loop(self, parent: Any, hub: Any) -> None:  # noqa: ARG002
        """Celery calls this when its loop starts."""
        self.node.waker.watch(hub)

    def stop(self, parent: Any) -> None:  # noqa: ARG002
        """The consumer stops or loses its connection."""
        self._timer.cancel()
