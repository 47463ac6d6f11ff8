"""The farm as Prometheus sees it: the ledger, read when it is asked. `docs/metrics.md` names every series.

One exporter for a farm; two say the same. It reads counters and sizes, never job records.
"""

from collections.abc import Iterable, Iterator, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from overpaint_shared.errors import ServiceError, SettingsError
from overpaint_shared.ledger import Count, JobState, Ledger, QueueState, WorkerRecord

KIND = ("state", "model", "method")


class FarmCollector(Collector):
    """Asks the ledger each time it is read. Without Redis only `overpaint_ledger_up` 0 is told."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterable[Metric]:
        """Everything, or what can be said without a ledger."""
        up = "1 if the ledger in Redis answered."
        try:
            told = list(self._asked())
        except ServiceError:
            return [GaugeMetricFamily("overpaint_ledger_up", up, value=0)]
        return [GaugeMetricFamily("overpaint_ledger_up", up, value=1), *told]

    def describe(self) -> Iterable[Metric]:
        """Nothing: Redis need not be there when the exporter starts."""
        return []

    def _asked(self) -> Iterator[Metric]:
        self._ledger.load_scripts()  # without a live worker nobody else would
        workers = self._ledger.workers()
        served = {model for worker in workers for model in worker.serves}
        yield _kinds(
            GaugeMetricFamily("overpaint_jobs", "Jobs whose record is kept.", labels=KIND),
            self._ledger.census(),
        )
        yield _kinds(
            CounterMetricFamily("overpaint_job_transitions", "Jobs that came into a state.", labels=KIND),
            _every_state(self._ledger.moves()),
        )
        yield from _queues(self._ledger.queues(served))
        yield from _workers(workers)
        yield GaugeMetricFamily(
            "overpaint_quarantined_messages",
            "Items of the queues and the ledger that could not be used, the newest hundred.",
            value=self._ledger.quarantined(),
        )


def _kinds(family: GaugeMetricFamily | CounterMetricFamily, counts: Sequence[Count]) -> Metric:
    for count in counts:
        family.add_metric([count.state.value, count.model, count.method], count.jobs)
    return family


def _every_state(counts: Sequence[Count]) -> list[Count]:
    """With 0 for a state that no job of a kind came into yet: `increase` does not see how a series begins."""
    told = {(count.state, count.model, count.method): count.jobs for count in counts}
    kinds = sorted({(model, method) for _, model, method in told})
    return [Count(state, *kind, told.get((state, *kind), 0)) for kind in kinds for state in JobState]


def _queues(queues: Sequence[QueueState]) -> Iterator[Metric]:
    depth = _by_model("overpaint_queue_depth", "Queued jobs, of all priorities and owners.")
    oldest = _by_model(
        "overpaint_queue_oldest_age_seconds", "How long the oldest queued job has waited; 0: none."
    )
    running = _by_model("overpaint_queue_jobs_running", "Jobs that run.")
    for queue in queues:
        depth.add_metric([queue.model], queue.depth)
        oldest.add_metric([queue.model], queue.oldest_s or 0.0)
        running.add_metric([queue.model], queue.running)
    return iter((depth, oldest, running))


def _workers(workers: Sequence[WorkerRecord]) -> Iterator[Metric]:
    serving = _by_model("overpaint_workers_serving", "Live workers that read a model's queue.")
    for model in sorted({model for worker in workers for model in worker.serves}):
        serving.add_metric([model], sum(model in worker.serves for worker in workers))
    yield GaugeMetricFamily("overpaint_workers", "Live workers.", value=len(workers))
    yield serving
    slots = GaugeMetricFamily("overpaint_farm_slots", "Jobs that the live workers may hold.")
    slots.add_metric([], sum(worker.slots for worker in workers))
    yield slots


def _by_model(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=("model",))


def registry(ledger: Ledger) -> CollectorRegistry:
    """A registry that asks `ledger`."""
    made = CollectorRegistry()
    made.register(FarmCollector(ledger))
    return made


def text(ledger: Ledger) -> str:
    """The farm's metrics now, in Prometheus' text format."""
    return prometheus_client.generate_latest(registry(ledger)).decode()


def serve(ledger: Ledger, host: str, port: int) -> int:
    """Serve `/metrics` from threads of its own; the port (another than 0). Raises SettingsError."""
    try:
        server, _ = prometheus_client.start_http_server(port, host, registry(ledger))
    except OSError as error:
        raise SettingsError(
            f"metrics cannot be served at {host}:{port}: {error.strerror or error}",
            field="--port",
            value=port,
            fix="name a free port",
        ) from error
    return int(server.server_port)
