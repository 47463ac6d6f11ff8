"""Every worker looks after the whole farm: abandoned jobs, lost messages, and its own place in the list of
workers.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import structlog
from celery import bootsteps
from celery.worker import state as celery_state

from overpaint_shared.errors import OverpaintError, ServiceError
from overpaint_worker.node import Node

LOOK_S = 0.5

log = structlog.get_logger(__name__)


class Reaper:
    """One thread's round: announce, send what was not sent, reap, look which models wait, and pass revokes
    on to the ledger.
    """

    def __init__(self, node: Node, clock: Callable[[], float] = time.monotonic) -> None:
        self._node = node
        self._clock = clock
        self._stopping = threading.Event()
        self._away = False
        self._next_reap = 0.0
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; does not wait."""
        self._stopping.set()

    def round(self) -> None:
        """Do what is due."""
        try:
            self._look()
            if self._clock() >= self._next_reap:
                self._next_reap = self._clock() + self._node.settings.reap_s
                self._node.announce()
                self._node.publish_unsent()
                self._reap()
        except ServiceError as error:
            if not self._away:
                log.warning("ledger away", action="reaper.away", error=str(error))
            self._away = True
            return
        except Exception:  # a farm without a reaper would forget jobs
            log.exception("unexpected error", action="reaper.unexpected")
            return
        if self._away:
            log.info("ledger back", action="reaper.back")
            self._away = False

    def _reap(self) -> None:
        reaped = self._node.ledger.reap()
        for action, jobs in (
            ("expired", reaped.expired),
            ("stale", reaped.stale),
            ("unable", reaped.unable),
            ("late", reaped.late),
        ):
            if jobs:
                log.warning(f"jobs {action}", action=f"reaper.{action}", jobs=list(jobs))
        for action, entries in (("odd", reaped.odd), ("mended", reaped.mended)):
            if entries:
                log.warning(f"ledger {action}", action=f"ledger.{action}", entries=list(entries))
        self._node.publish(reaped.wakeups)
        for job_id in reaped.unnamed:
            self._node.storage.later(("name", job_id), partial(self._node.name_picture, job_id))

    def _look(self) -> None:
        intake = self._node.intake
        if len(intake.models) > 1:
            waiting = {model: self._node.ledger.oldest_waiting(model) for model in intake.models.values()}
            intake.waiting = {model: seconds for model, seconds in waiting.items() if seconds is not None}
        self._pass_revokes_on()

    def _pass_revokes_on(self) -> None:
        """Celery drops messages of revoked ids for three hours; a replayed job must not be one of them."""
        for job_id in list(celery_state.revoked):
            try:
                released = self._node.ledger.cancel(job_id)
            except OverpaintError as error:
                if isinstance(error, ServiceError):
                    raise
            else:
                log.info("job revoked", action="job.revoked", job=job_id, state=str(released.state))
                self._node.publish(released.wakeups)
            celery_state.revoked.discard(job_id)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.round()
            self._stopping.wait(LOOK_S)


class ReaperStep(bootsteps.StartStopStep):
    """Runs the reaper beside the consumer."""

    requires = ("celery.worker.components:Pool",)
    node: ClassVar[Node]

    def start(self, parent: Any) -> None:  # noqa: ARG002  # Celery's signature
        """Begin."""
        self._reaper = Reaper(self.node)
        self._reaper.start()

    def stop(self, parent: Any) -> None:  # noqa: ARG002
        """End."""
        self._reaper.stop()

    terminate = stop
