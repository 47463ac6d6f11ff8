"""What a worker counts, for Prometheus. `docs/metrics.md` names every series.

Counters and histograms are fed where things happen; gauges are asked of the worker when they are read. All
is kept whether or not `--metrics-port` serves it, at a few additions per job.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from overpaint_shared import __version__
from overpaint_shared.errors import SettingsError
from overpaint_shared.ledger import ReleaseReason
from overpaint_worker.protocol import STAGES, Stats
from overpaint_worker.speed import Speed

if TYPE_CHECKING:
    from overpaint_worker.node import Node

WAIT: Final = "wait"
"""The stage before a worker has the job: from its place in the queue to its claim."""
COMMIT: Final = "commit"
"""The stage after all others: telling the ledger."""
STAGE_S: Final = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)
LOAD_S: Final = (0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 900, 1800)

# A second series for each, which no panel reads.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The counters of one worker process, which serves `models`, in a registry of their own."""

    def __init__(self, models: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.speed = Speed()
        self._stages = self._histogram(
            "overpaint_job_stage_seconds", "Time of jobs in each stage.", STAGE_S, "stage"
        )
        self._durations = self._histogram(
            "overpaint_attempt_duration_seconds",
            "Claim to commit, of jobs that are done.",
            STAGE_S,
            "model",
            "method",
        )
        self._loads = self._histogram(
            "overpaint_model_load_seconds", "Time to load a model.", LOAD_S, "model"
        )
        self._attempts = self._counter(
            "overpaint_attempts_total", "Attempts begun: claims that were granted."
        )
        self._ended = self._counter(
            "overpaint_attempts_ended_total", "Attempts ended, by outcome.", "model", "method", "outcome"
        )
        self._releases = self._counter(
            "overpaint_job_releases_total", "Jobs given back, by reason.", "reason"
        )
        self._cancels = self._counter(
            "overpaint_job_cancels_total", "Running jobs that were to be cancelled."
        )
        self._steps = self._counter("overpaint_engine_steps_total", "Steps made, of all jobs.")
        self._exits = self._counter("overpaint_engine_exits_total", "Engine processes that died or hung.")
        self._missed = self._counter(
            "overpaint_lease_renewals_missed_total",
            "Renewals that did not reach the ledger, one for each job.",
        )
        self._lost = self._counter(
            "overpaint_leases_lost_total", "Attempts whose job was another's meanwhile."
        )
        self._retries = self._counter(
            "overpaint_service_retries_total", "Calls to Redis or S3 that were tried again."
        )
        # Told from the start: `increase` does not see how a series begins.
        for stage in (WAIT, *STAGES, COMMIT):
            self._stages.labels(stage)
        for reason in ReleaseReason:
            self._releases.labels(reason.value)
        for model in models:
            self._loads.labels(model)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    # Told by the task

    def claimed(self, waited_s: float | None) -> None:
        """An attempt began; its job had waited so long, if the ledger said."""
        self._attempts.inc()
        if waited_s is not None:
            self.stage(WAIT, waited_s)

    def ended(self, model: str, method: str, outcome: str, seconds: float) -> None:
        """An attempt ended: `done`, `failed`, `cancelled`, `released`, `fenced` or `uncommitted`."""
        self._ended.labels(model, method, outcome).inc()
        if outcome == "done":
            self._durations.labels(model, method).observe(seconds)

    def released(self, reason: ReleaseReason) -> None:
        """A job was given back."""
        self._releases.labels(reason.value).inc()

    def retried(self) -> None:
        """A service was away for one call."""
        self._retries.inc()

    # Told by the keeper of leases

    def stage(self, stage: str, seconds: float) -> None:
        """A job has left a stage."""
        self._stages.labels(stage).observe(seconds)

    def stepped(self, steps: int) -> None:
        """Jobs made steps."""
        self._steps.inc(steps)
        self.speed.add(steps)

    def cancelling(self) -> None:
        """A running job is to be cancelled."""
        self._cancels.inc()

    def missed(self, jobs: int) -> None:
        """The leases of so many jobs could not be renewed."""
        self._missed.inc(jobs)

    def lost(self) -> None:
        """A lease is another's."""
        self._lost.inc()

    # Told by the engine's client

    def loaded(self, model: str, seconds: float) -> None:
        """The engine loaded a model."""
        self._loads.labels(model).observe(seconds)

    def engine_gone(self) -> None:
        """The engine ended without being asked."""
        self._exits.inc()

    # Serving

    def serve(self, node: "Node", host: str, port: int) -> int:
        """Serve `/metrics` from a thread of its own; the port (another than 0). Raises SettingsError."""
        self.registry.register(NodeCollector(node))
        try:
            server, _ = prometheus_client.start_http_server(port, host, self.registry)
        except OSError as error:
            raise SettingsError(
                f"metrics cannot be served at {host}:{port}: {error.strerror or error}",
                field="--metrics-port",
                value=port,
                fix="name a free port",
            ) from error
        return int(server.server_port)


@dataclass(frozen=True)
class _Gauges:
    """Gauges of one worker, without labels."""

    rows: list[tuple[str, str, float]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Metric]:
        return (GaugeMetricFamily(name, text, value=value) for name, text, value in self.rows)


class NodeCollector(Collector):
    """What is asked of a worker when its metrics are read."""

    def __init__(self, node: "Node") -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        """The worker as it stands, and what its engine said last."""
        yield self._info()
        yield from self._worker()
        loaded = GaugeMetricFamily(
            "overpaint_model_loaded", "1 for each model on the device.", labels=["model"]
        )
        for model in sorted(self._node.engine.loaded):
            loaded.add_metric([model], 1)
        yield loaded
        yield from _engine(self._node.engine.stats)

    def _info(self) -> Metric:
        node, ready = self._node, self._node.ready
        value = {
            "worker": node.name,
            "host": node.host,
            "device": node.options.device,
            "device_name": ready.device_name if ready else "",
            "version": __version__,
        }
        return InfoMetricFamily("overpaint_worker", "The worker and its device.", value)

    def _worker(self) -> _Gauges:
        node, intake, ready = self._node, self._node.intake, self._node.ready
        return _Gauges(
            [
                ("overpaint_worker_slots", "Jobs that it may hold.", node.options.slots),
                ("overpaint_worker_credits", "Jobs that its engine wants to hold.", intake.credits),
                ("overpaint_worker_jobs_running", "Jobs that it holds.", len(node.keeper.running)),
                ("overpaint_worker_engine_up", "1 while its engine takes jobs.", intake.engine_up),
                (
                    "overpaint_worker_store_up",
                    "1 while S3 keeps it from no job.",
                    not intake.store_away(),
                ),
                ("overpaint_worker_draining", "1 once it takes no more jobs.", intake.draining),
                (
                    "overpaint_device_memory_total_bytes",
                    "Memory of the device, of the machine for `cpu`.",
                    ready.memory_total if ready else 0,
                ),
            ]
        )


def _engine(stats: Stats | None) -> Iterator[Metric]:
    """What the engine said last; zeros while there is none. Its totals begin anew with each engine."""
    s = stats or Stats(live=0, held=0, turns=0, rows=0, memory_used=0)
    yield CounterMetricFamily("overpaint_engine_passes", "Forward passes of the step loop.", value=s.turns)
    yield CounterMetricFamily("overpaint_engine_rows", "Rows evaluated, padding not counted.", value=s.rows)
    yield from _Gauges(
        [
            ("overpaint_engine_jobs_stepping", "Jobs in the step loop.", s.live),
            ("overpaint_engine_jobs_held", "Jobs anywhere in the engine.", s.held),
            ("overpaint_engine_row_limit", "Rows that one pass may have.", s.row_limit),
            (
                "overpaint_device_memory_used_bytes",
                "Memory of the device in use (resident set for `cpu`).",
                s.memory_used,
            ),
        ]
    )
