"""One worker process: its parts, made and joined. Nothing of torch is imported here."""

import socket
import time
import uuid
from collections import deque
from collections.abc import Sequence

import structlog
from celery import Celery
from celery.worker import state as celery_state

from overpaint_shared import __version__
from overpaint_shared.errors import ServiceError
from overpaint_shared.ledger import Claim, JobState, Ledger, Wakeup, WorkerRecord
from overpaint_shared.queues import make_app, publish, queue_name
from overpaint_shared.settings import Limits, Settings
from overpaint_shared.store import Store
from overpaint_worker import logs, naming, patience, protocol, transport
from overpaint_worker.cycle import STRATEGY, Intake, ModelCycle
from overpaint_worker.engine.options import EngineOptions
from overpaint_worker.engine_client import EngineClient
from overpaint_worker.engine_process import Launch, engine_environment
from overpaint_worker.keeper import Keeper
from overpaint_worker.metrics import Metrics
from overpaint_worker.options import CPU, WorkerOptions
from overpaint_worker.stopping import Drain
from overpaint_worker.storage import Storage
from overpaint_worker.tasks import register
from overpaint_worker.waker import Waker

CLAIM_PAUSE_S = 1.0
MAX_UNSENT = 2000
"""Messages that Redis refused, kept to be sent again. Of more the oldest are left to the reaper."""

log = structlog.get_logger(__name__)


class Node:
    """Everything that a worker holds. It listens to its engine, and is the room in which the task works."""

    def __init__(
        self, options: WorkerOptions, settings: Settings, patient: patience.Patience | None = None
    ) -> None:
        self.options = options
        self.settings = settings.ledger()
        self.limits = settings.limits()
        self.patience = patient or patience.Patience()
        self.worker_id = str(uuid.uuid4())
        self.host = socket.gethostname()
        self.name = (
            f"{options.name or options.device.replace(':', '') + '-' + self.worker_id[:4]}@{self.host}"
        )
        self.started = time.time()
        self.ready: protocol.Ready | None = None
        self.ledger = Ledger.connect(settings.redis_url, self.settings)
        self.store = Store(settings.store())
        self.waker = Waker()
        self._unsent: deque[Wakeup] = deque(maxlen=MAX_UNSENT)
        self.metrics = Metrics(options.models)
        self._warming: set[str] = set()
        self.drain = Drain(self, options.grace_s)
        self.intake = Intake(
            {queue_name(model): model for model in options.models},
            slots=options.slots,
            held=lambda: len(celery_state.reserved_requests),
            switch_after_s=options.switch_after_s,
            store_away=lambda: self.storage.blocked,
        )
        self.engine = EngineClient(
            _launch(options, self.limits), self, models=options.models, spare=options.spare
        )
        self.keeper = Keeper(
            self.ledger,
            self.worker_id,
            renew_s=self.settings.renew_s,
            publish=self.publish,
            on_cancel=lambda a: self.engine.cancel(a.job, a.token),
            on_fenced=lambda a: self.engine.forget(a.job, a.token),
            metrics=self.metrics,
        )
        self.storage = Storage(self.store, self.keeper, self.metrics.retried, self.waker.wake)
        self.app = self._make_app(settings.redis_url)

    def _make_app(self, redis_url: str) -> Celery:
        transport.install(self.intake)
        ModelCycle.intake = self.intake
        app = make_app(redis_url, self.options.models)
        app.conf.broker_transport_options = {
            **app.conf.broker_transport_options,
            "queue_order_strategy": STRATEGY,
        }
        app.conf.update(
            worker_pool="threads",
            worker_concurrency=self.options.slots,
            # Whatever Redis refuses, and is not met already, costs the connection and not the worker.
            broker_channel_error_retry=True,
            worker_hijack_root_logger=False,
            worker_redirect_stdouts=False,
        )
        register(app, self)
        return app

    # Messages and claims

    def publish(self, wakeups: Sequence[Wakeup]) -> None:
        """Send the messages that a ledger call asked for. What cannot be sent now is kept for
        `publish_unsent`; should this worker end, a reaper sends it.
        """
        if not wakeups:
            return
        try:
            publish(self.app, wakeups)
        except Exception as error:  # kombu has many kinds
            self._unsent.extend(wakeups)
            log.warning("messages not sent", action="wakeups.failed", count=len(wakeups), error=repr(error))

    def publish_unsent(self) -> None:
        """Try again to send what could not be sent."""
        wakeups = [self._unsent.popleft() for _ in range(len(self._unsent))]
        self.publish(wakeups)

    def claim(self, job_id: str) -> Claim:
        """Claim a job for this worker. While the ledger is away this waits: nobody else could take the job,
        and its message is used up. Raises ServiceError when the worker stops.
        """
        call, pause_s, said = uuid.uuid4().hex, patience.FIRST_PAUSE_S, False
        while True:
            features = self.ready.features if self.ready else ()
            try:
                return self.ledger.claim(job_id, self.worker_id, features, self.options.models, call=call)
            except ServiceError as error:
                if self.drain.asked or self.keeper.closed:
                    raise
                if not said:
                    log.warning("a claim waits", action="job.claim_waits", job=job_id, error=str(error))
                said = True
            self.drain.until(pause_s)
            pause_s = min(CLAIM_PAUSE_S, pause_s * 2)

    def name_picture(self, job_id: str) -> None:
        """Finish a committed job whose worker was lost before its picture had its name."""
        try:
            finished = naming.complete(self.store, self.ledger, job_id)
        except Exception as error:  # a reaper is asked again after a lease
            log.warning("picture not named", action="job.not_named", job=job_id, error=str(error))
            return
        if finished is None or not finished.accepted:
            return
        self.publish(finished.wakeups)
        if finished.state is JobState.DONE:
            log.info("picture named for a lost worker", action="job.named", job=job_id)
        else:
            log.warning("picture not named: the job failed", action="job.not_named", job=job_id)

    def slot_freed(self) -> None:
        """Look for the next message at once."""
        self.waker.wake()

    # What the engine says

    def engine_ready(self, ready: protocol.Ready) -> None:
        """Announce first what it can render, then load what is to be warm, then take messages.

        After a crash messages are taken at once: the jobs that come back are fetched during the load.
        """
        first, self.ready = self.ready is None, ready
        self.announce()
        last_used_first = reversed(self.engine.had_loaded)
        self._warming = set(self.options.warm) if first else set()
        for model in dict.fromkeys((*last_used_first, *self.options.warm)):
            self.engine.load(model)
        self._open_if_warm()

    def engine_loaded(self, model: str, seconds: float) -> None:
        """Take messages, if this was the last model to be warm."""
        self.metrics.loaded(model, seconds)
        self._warmed(model)

    def engine_not_loaded(self, model: str) -> None:
        """Go on without it: its jobs are told why when they come, and other models' jobs are rendered."""
        self._warmed(model)

    def _warmed(self, model: str) -> None:
        if model in self._warming:
            self._warming.discard(model)
            self._open_if_warm()

    def _open_if_warm(self) -> None:
        if not self._warming:
            self.intake.engine_up = True
            log.info("taking jobs", action="worker.open", models=list(self.options.models))
            self.waker.wake()

    def engine_gone(self) -> None:
        """Take no messages for now."""
        self.metrics.engine_gone()
        self.intake.engine_up = False

    def engine_progress(self, progress: protocol.Progress) -> None:
        """Tell the ledger soon."""
        self.keeper.progress(progress.job, progress.token, progress.stage, progress.step, progress.of)

    def engine_credits(self, slots: int) -> None:
        """Hold so many jobs."""
        self.intake.credits = slots
        self.waker.wake()

    def engine_given_up(self, reason: str) -> None:
        """Stop."""
        self.drain.fail(reason)

    # What the drain asks

    def close_intake(self) -> None:
        """Take no more messages."""
        self.intake.draining = True

    def busy(self) -> int:
        """How many messages have not ended."""
        return len(celery_state.reserved_requests)

    def release_all(self) -> int:
        """Give the running jobs back, so that others go on at once."""
        return self.keeper.release_all()

    def leave(self, exit_code: int) -> None:
        """Let Celery stop."""
        celery_state.should_stop = exit_code  # type: ignore[assignment]  # typed by its first value, None
        self.waker.wake()

    # Being known

    def record(self) -> WorkerRecord | None:
        """How this worker is listed; None before its engine is up."""
        ready, stats = self.ready, self.engine.stats
        if ready is None:
            return None
        return WorkerRecord(
            id=self.worker_id,
            name=self.name,
            host=self.host,
            device=self.options.device,
            slots=self.options.slots,
            version=__version__,
            features=frozenset(ready.features),
            catalogue=tuple(ready.catalogue),
            models=self.options.models,
            running=len(self.keeper.running),
            started=self.started,
            device_name=ready.device_name,
            memory_total=ready.memory_total,
            memory_used=stats.memory_used if stats else None,
            loaded=min(self.engine.loaded, default=None),
            warm=tuple(sorted(self.engine.loaded)),
            jobs=tuple(attempt.job for attempt in self.keeper.running),
            steps_per_s=self.metrics.speed.per_s(),
            more={
                "versions": ready.versions,
                "engine_pid": self.engine.pid,
                "waits_for": "S3" if self.intake.store_away() else None,
            },
        )

    def announce(self) -> None:
        """Refresh this worker's record."""
        record = self.record()
        if record is None or self.drain.asked:
            return
        try:
            self.ledger.announce(record, self.settings.worker_ttl_s)
        except ServiceError as error:
            log.info("not announced", action="worker.not_announced", error=str(error))

    def start(self) -> None:
        """Start the engine and the keeper of leases; called in the main thread."""
        logs.identify(worker=self.name)
        self._serve_metrics()
        self.drain.start()
        self.keeper.start()
        self.storage.start()
        self.engine.start()
        log.info("worker started", action="worker.started", worker=self.name, id=self.worker_id)

    def _serve_metrics(self) -> None:
        host, port = self.options.metrics_host, self.options.metrics_port
        if port is not None:
            port = self.metrics.serve(self, host, port)
            log.info("metrics served", action="metrics.serving", address=f"http://{host}:{port}/metrics")

    def close(self) -> None:
        """Give back what still runs, end the engine, and be listed no more. May be called twice."""
        self.close_intake()
        self.keeper.release_all()
        self.keeper.stop()
        self.storage.stop()
        self.engine.stop()
        try:
            self.ledger.retire(self.worker_id)
        except ServiceError as error:
            log.info("not retired", action="worker.not_retired", error=str(error))


def _launch(options: WorkerOptions, limits: Limits) -> Launch:
    engine = EngineOptions(
        fd=-1,  # appended for each process
        registry=options.registry,
        device=CPU if options.index is None else "cuda:0",  # the only one that it can see
        threads=options.threads,
        hashes=options.hashes,
        limits=limits,
        json_logs=options.json_logs,
    )
    return Launch(
        argv=[*options.engine, *engine.argv()],
        environment=engine_environment(options.visible_devices(), options.engine_env),
        answer_s=options.answer_s,
    )
