"""Counters in Prometheus's text format, made from the statistics at each request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from bnexport.serving.counters import Histogram, Totals
from bnexport.serving.state import ServerState

_MODEL = ("model", "version")


class _TotalsCollector(Collector):
    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        """Yield every counter."""
        requests = CounterMetricFamily(
            "bnexport_http_requests", "Requests by route and status.", labels=("route", "status")
        )
        for (route, status), count in self._totals.requests.items():
            requests.add_metric((route or "none", str(status)), count)
        yield requests
        active = GaugeMetricFamily("bnexport_http_requests_active", "Requests in progress.")
        active.add_metric((), self._totals.active - self._totals.calls_active)
        yield active
        calls = CounterMetricFamily("bnexport_grpc_calls", "Calls by method and code.", labels=("method", "code"))
        for call, count in self._totals.calls.items():
            calls.add_metric(call, count)
        yield calls
        active = GaugeMetricFamily("bnexport_grpc_calls_active", "Calls in progress.")
        active.add_metric((), self._totals.calls_active)
        yield active
        starts = CounterMetricFamily("bnexport_process_starts", "Starts of a process.", labels=("process",))
        for number, count in sorted(self._totals.starts.items()):
            starts.add_metric((str(number),), count)
        if self._totals.starts:
            yield starts
        yield from self._models()

    def _models(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("bnexport_model_ready", "1 if the version answers requests.", labels=_MODEL)
        waiting = GaugeMetricFamily("bnexport_queue_length", "Requests that wait for a session.", labels=_MODEL)
        workers = GaugeMetricFamily("bnexport_sessions", "Sessions of the engine.", labels=_MODEL)
        rows = CounterMetricFamily("bnexport_samples", "Samples that an engine ran.", labels=_MODEL)
        failed = CounterMetricFamily("bnexport_failures", "Requests to a model that failed.", labels=_MODEL)
        queue = CounterMetricFamily("bnexport_queue_seconds", "Seconds that requests waited.", labels=_MODEL)
        infer = CounterMetricFamily("bnexport_inference_seconds", "Seconds of the engine, by request.", labels=_MODEL)
        seconds = HistogramMetricFamily(
            "bnexport_request_seconds", "Seconds from a request to its answer.", labels=_MODEL
        )
        batches = HistogramMetricFamily("bnexport_batch_rows", "Samples in a batch.", labels=_MODEL)
        for key, found in self._totals.models.items():
            ready.add_metric(key, 1 if found.ready else 0)
            if found.statistics is None:
                continue
            counted = found.statistics
            waiting.add_metric(key, found.waiting)
            workers.add_metric(key, found.sessions)
            rows.add_metric(key, counted.rows)
            failed.add_metric(key, counted.fail.count)
            queue.add_metric(key, counted.queue.ns * 1e-9)
            infer.add_metric(key, counted.infer.ns * 1e-9)
            seconds.add_metric(key, _buckets(counted.seconds), counted.seconds.total)
            batches.add_metric(key, _buckets(counted.batches), counted.batches.total)
        yield from (ready, waiting, workers, rows, failed, queue, infer, seconds, batches)


class _ProcessesCollector(Collector):
    """System metrics of several processes, with the label ``process``."""

    def __init__(self, processes: Mapping[int, int]) -> None:
        self._processes = processes

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of ``ProcessCollector`` for each process."""
        found: dict[str, Metric] = {}
        for number, pid in sorted(self._processes.items()):
            for metric in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
                samples = [sample._replace(labels={"process": str(number)}) for sample in metric.samples]
                metric.samples = []
                found.setdefault(metric.name, metric).samples += samples
        yield from found.values()


def render(state: ServerState) -> bytes:
    """Return the metrics as text, with memory, CPU time and open files of the processes if the system provides them."""
    totals = state.totals()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_TotalsCollector(totals))
    if totals.processes:
        registry.register(_ProcessesCollector(totals.processes))
    else:
        ProcessCollector(registry=registry)
    return generate_latest(registry)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return the upper edges with cumulative counts, as Prometheus has them."""
    total, buckets = 0, []
    for edge, count in zip((*map(str, histogram.edges), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((edge, float(total)))
    return buckets
