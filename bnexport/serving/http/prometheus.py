"""Counters in Prometheus's text format, made from the statistics at each request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from bnexport.serving.counters import Histogram, ModelTotals, Totals
from bnexport.serving.state import ServerState

_MODEL = ("model", "version")


def render(state: ServerState) -> bytes:
    """Return the metrics as text, with memory, CPU time and open files of the processes if the system provides them."""
    totals = state.totals()
    processes = _of_processes(totals.processes) if totals.processes else ProcessCollector(registry=None).collect()
    metrics = (*_of_server(totals), *_of_models(totals.models), *processes)
    registry: Any = SimpleNamespace(collect=lambda: metrics)  # the one method of a registry that is called
    return generate_latest(registry)


def _of_server(totals: Totals) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "bnexport_http_requests", "Requests by route and status.", labels=("route", "status")
    )
    for (route, status), count in totals.requests.items():
        requests.add_metric((route or "none", str(status)), count)
    yield requests
    yield GaugeMetricFamily(
        "bnexport_http_requests_active", "Requests in progress.", totals.active - totals.calls_active
    )
    calls = CounterMetricFamily("bnexport_grpc_calls", "Calls by method and code.", labels=("method", "code"))
    for call, count in totals.calls.items():
        calls.add_metric(call, count)
    yield calls
    yield GaugeMetricFamily("bnexport_grpc_calls_active", "Calls in progress.", totals.calls_active)
    if totals.starts:
        starts = CounterMetricFamily("bnexport_process_starts", "Starts of a process.", labels=("process",))
        for number, count in sorted(totals.starts.items()):
            starts.add_metric((str(number),), count)
        yield starts


def _of_models(models: Mapping[tuple[str, str], ModelTotals]) -> Iterator[Metric]:
    ready = GaugeMetricFamily("bnexport_model_ready", "1 if the version answers requests.", labels=_MODEL)
    waiting = GaugeMetricFamily("bnexport_queue_length", "Requests that wait for a session.", labels=_MODEL)
    workers = GaugeMetricFamily("bnexport_sessions", "Sessions of the engine.", labels=_MODEL)
    rows = CounterMetricFamily("bnexport_samples", "Samples that an engine ran.", labels=_MODEL)
    failed = CounterMetricFamily("bnexport_failures", "Requests to a model that failed.", labels=_MODEL)
    queue = CounterMetricFamily("bnexport_queue_seconds", "Seconds that requests waited.", labels=_MODEL)
    infer = CounterMetricFamily("bnexport_inference_seconds", "Seconds of the engine, by request.", labels=_MODEL)
    seconds = HistogramMetricFamily("bnexport_request_seconds", "Seconds from a request to its answer.", labels=_MODEL)
    batches = HistogramMetricFamily("bnexport_batch_rows", "Samples in a batch.", labels=_MODEL)
    for key, found in models.items():
        ready.add_metric(key, 1 if found.ready else 0)
        if (counted := found.statistics) is None:
            continue
        waiting.add_metric(key, found.waiting)
        workers.add_metric(key, found.sessions)
        rows.add_metric(key, counted.rows)
        failed.add_metric(key, counted.fail.count)
        queue.add_metric(key, counted.queue.ns * 1e-9)
        infer.add_metric(key, counted.infer.ns * 1e-9)
        seconds.add_metric(key, _buckets(counted.seconds), counted.seconds.total)
        batches.add_metric(key, _buckets(counted.batches), counted.batches.total)
    yield from (ready, waiting, workers, rows, failed, queue, infer, seconds, batches)


def _of_processes(processes: Mapping[int, int]) -> Iterator[Metric]:
    """Yield the metrics of ``ProcessCollector`` for each process, with the label ``process``."""
    found: dict[str, Metric] = {}
    for number, pid in sorted(processes.items()):
        for metric in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
            samples = [sample._replace(labels={"process": str(number)}) for sample in metric.samples]
            metric.samples = []
            found.setdefault(metric.name, metric).samples += samples
    yield from found.values()


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return the upper edges with cumulative counts, as Prometheus has them."""
    total, buckets = 0, []
    for edge, count in zip((*map(str, histogram.edges), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((edge, float(total)))
    return buckets
