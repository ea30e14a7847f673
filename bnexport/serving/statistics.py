"""Counters of one model version: plain numbers, added up on the event loop's thread alone, read by whoever reports them."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

#: Upper edges of the histogram of answer times, in seconds: a LeNet's 100 us to a slow model's 10 s.
SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
#: Upper edges of the histogram of batch sizes.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

#: The fields of ModelStatistics by their kind.
_DURATIONS, _HISTOGRAMS = ("success", "fail", "queue", "infer"), ("seconds", "batches")
_NUMBERS = ("rows", "executions", "last_ms")


@dataclass(slots=True)
class Duration:
    """How often something happened, and how many nanoseconds it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, times: int = 1) -> None:
        """Add ``times`` happenings of ``ns`` nanoseconds together."""
        self.count += times
        self.ns += ns

    def merge(self, other: Duration) -> None:
        """Add what another process counted."""
        self.add(other.ns, other.count)


@dataclass(slots=True)
class Histogram:
    """Counts between edges, and the sum of what was counted."""

    edges: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.edges) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value

    def merge(self, other: Histogram) -> None:
        """Add what another process counted, between the same edges."""
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


@dataclass(slots=True)
class ModelStatistics:
    """Of one version of one model, since it was loaded.

    Attributes:
        success: Whole requests, from their last byte to their answer.
        fail: The same of those that failed.
        queue: Time in the queue.
        infer: Time of the engine, shared out among the requests of a batch.
        rows: Samples.
        executions: Batches.
        last_ms: Milliseconds since 1970 of the last request; 0 before the first.
        seconds: Histogram of ``success``.
        batches: Histogram of batch sizes.
        by_size: Batch size -> time of the engine.
    """

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    rows: int = 0
    executions: int = 0
    last_ms: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    batches: Histogram = field(default_factory=lambda: Histogram(ROWS))
    by_size: dict[int, Duration] = field(default_factory=dict)

    def executed(self, *, requests: int, rows: int, queue_ns: int, infer_ns: int) -> None:
        """Count one batch.

        Args:
            requests: How many it was made of.
            rows: Samples in it.
            queue_ns: Nanoseconds that its requests waited, in sum.
            infer_ns: Nanoseconds of the engine.
        """
        self.executions += 1
        self.rows += rows
        self.queue.add(queue_ns, requests)
        self.infer.add(infer_ns, requests)
        self.batches.add(rows)
        if (of_size := self.by_size.get(rows)) is None:
            of_size = self.by_size[rows] = Duration()
        of_size.add(infer_ns)

    def answered(self, ns: int, *, ok: bool) -> None:
        """Count one request."""
        duration = self.success if ok else self.fail
        duration.count += 1
        duration.ns += ns
        self.last_ms = time.time_ns() // 1_000_000
        if ok:
            self.seconds.add(ns * 1e-9)

    def merge(self, other: ModelStatistics) -> None:
        """Add what another process counted of the same version."""
        for name in _DURATIONS:
            getattr(self, name).merge(getattr(other, name))
        self.rows += other.rows
        self.executions += other.executions
        self.last_ms = max(self.last_ms, other.last_ms)
        self.seconds.merge(other.seconds)
        self.batches.merge(other.batches)
        for size, found in other.by_size.items():
            self.by_size.setdefault(size, Duration()).merge(found)

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values, from which ``from_record`` makes the same counters in another process."""
        return {
            **{name: [getattr(self, name).count, getattr(self, name).ns] for name in _DURATIONS},
            **{name: getattr(self, name) for name in _NUMBERS},
            **{name: [getattr(self, name).counts, getattr(self, name).total] for name in _HISTOGRAMS},
            "by_size": [[size, found.count, found.ns] for size, found in self.by_size.items()],
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ModelStatistics:
        """The counters that ``to_record`` wrote."""
        found = cls(**{name: record[name] for name in _NUMBERS})
        for name in _DURATIONS:
            setattr(found, name, Duration(*record[name]))
        for name in _HISTOGRAMS:
            histogram = getattr(found, name)
            histogram.counts, histogram.total = record[name]
        found.by_size = {size: Duration(count, ns) for size, count, ns in record["by_size"]}
        return found

    def to_json(self, name: str, version: str) -> dict[str, Any]:
        """One entry of "model_stats" (Triton, "Statistics Extension")."""
        nothing = Duration()
        durations = {
            "success": self.success,
            "fail": self.fail,
            "queue": self.queue,
            "compute_input": nothing,
            "compute_infer": self.infer,
            "compute_output": nothing,
            "cache_hit": nothing,
            "cache_miss": nothing,
        }
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.rows,
            "execution_count": self.executions,
            "inference_stats": {key: {"count": found.count, "ns": found.ns} for key, found in durations.items()},
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": {"count": 0, "ns": 0},
                    "compute_infer": {"count": found.count, "ns": found.ns},
                    "compute_output": {"count": 0, "ns": 0},
                }
                for size, found in sorted(self.by_size.items())
            ],
        }
