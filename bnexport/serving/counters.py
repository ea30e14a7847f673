"""Counters of a server: of one model version, of one process, and of all processes that share a port.

Counters are plain numbers, updated on the event loop's thread. They are hand-written on purpose: prometheus_client's
multiprocess mode does not take custom collectors. Several processes share their counters in memory that all of them have open.
"""

from __future__ import annotations

import os
import pickle
import struct
import time
import zlib
from bisect import bisect_left
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

#: Upper edges of the histogram of answer times, in seconds: a LeNet's 100 us to a slow model's 10 s.
SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
#: Upper edges of the histogram of batch sizes.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(slots=True)
class Duration:
    """Number of events and their total nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, times: int = 1) -> None:
        """Add ``times`` events that took ``ns`` nanoseconds in total."""
        self.count += times
        self.ns += ns

    def merge(self, other: Duration) -> None:
        """Add another process's counts."""
        self.add(other.ns, other.count)


@dataclass(slots=True)
class Histogram:
    """Counts between edges, and the sum of the counted values."""

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
        """Add another process's counts between the same edges."""
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


@dataclass(slots=True)
class ModelStatistics:
    """Counters of one version of one model, since it was loaded."""

    success: Duration = field(default_factory=Duration)  # Whole requests, from their last byte to their answer
    fail: Duration = field(default_factory=Duration)  # Failed requests, likewise
    queue: Duration = field(default_factory=Duration)  # Time in the queue
    infer: Duration = field(default_factory=Duration)  # Time of the engine, divided among the requests of a batch
    rows: int = 0  # Samples
    executions: int = 0  # Batches
    last_ms: int = 0  # Milliseconds since 1970 of the last request; 0 before the first
    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))  # Histogram of ``success``
    batches: Histogram = field(default_factory=lambda: Histogram(ROWS))  # Histogram of batch sizes
    by_size: dict[int, Duration] = field(default_factory=dict)  # Batch size -> time of the engine

    def executed(self, *, requests: int, rows: int, queue_ns: int, infer_ns: int) -> None:
        """Count one batch."""
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
        """Add another process's counts of the same version."""
        for name in ("success", "fail", "queue", "infer", "seconds", "batches"):
            getattr(self, name).merge(getattr(other, name))
        self.rows += other.rows
        self.executions += other.executions
        self.last_ms = max(self.last_ms, other.last_ms)
        for size, found in other.by_size.items():
            self.by_size.setdefault(size, Duration()).merge(found)

    def to_json(self, name: str, version: str) -> dict[str, Any]:
        """Return one entry of "model_stats" (Triton, "Statistics Extension")."""
        nothing = {"count": 0, "ns": 0}
        unmeasured = {"compute_input": nothing, "compute_output": nothing}
        measured = {"success": self.success, "fail": self.fail, "queue": self.queue, "compute_infer": self.infer}
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.rows,
            "execution_count": self.executions,
            "inference_stats": {key: asdict(found) for key, found in measured.items()}
            | unmeasured
            | {"cache_hit": nothing, "cache_miss": nothing},
            "batch_stats": [
                {"batch_size": size, "compute_infer": asdict(found), **unmeasured}
                for size, found in sorted(self.by_size.items())
            ],
        }


#: Header of a record: its sequence number, its length, and its CRC-32.
_HEAD = struct.Struct("<QII")
#: Bytes of one of the two places of each slot. Unwritten bytes take no memory.
_PLACE = 1 << 24
_TRIES = 5
#: A heartbeat, and the bytes before the records for the heartbeats of all slots.
_BEAT, _BEATS = struct.Struct("<Q"), 4096


class Records:
    """A record of counters and a heartbeat per slot; each slot has one writer at a time, and any number of readers.

    A record is written to the older of two places, so a reader always finds a complete one, even if the writer was killed
    during a write. The memory has no name, and disappears with the last process. ``new_memory`` makes it in the process that
    starts the others.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, slot: int, record: bytes) -> bool:
        """Replace a slot's record. Return False for one of more than 16 MB (about ten thousand models), not written."""
        if len(record) > _PLACE - _HEAD.size:
            return False
        numbers = [found[0] if (found := self._place(slot, index)) is not None else 0 for index in (0, 1)]
        older = numbers.index(min(numbers))
        head = _HEAD.pack(max(numbers) + 1, len(record), zlib.crc32(record))
        os.pwrite(self._descriptor, head + record, _offset(slot, older))
        return True

    def read(self, slot: int) -> bytes | None:
        """Return a slot's newest record; None before the first."""
        for _ in range(_TRIES):  # both places are torn only if the writer wrote twice meanwhile
            found = [place for index in (0, 1) if (place := self._place(slot, index)) is not None]
            if found:
                return max(found)[1]
        return None

    def beat(self, slot: int) -> None:
        """Write a heartbeat."""
        os.pwrite(self._descriptor, _BEAT.pack(time.monotonic_ns()), slot * _BEAT.size)

    def heartbeat(self, slot: int) -> bytes:
        """Return the last heartbeat; each one has different bytes."""
        return os.pread(self._descriptor, _BEAT.size, slot * _BEAT.size)

    def _place(self, slot: int, index: int) -> tuple[int, bytes] | None:
        """Return number and bytes of a record; None if it is missing or torn."""
        start = _offset(slot, index)
        head = os.pread(self._descriptor, _HEAD.size, start)
        if len(head) < _HEAD.size:
            return None
        number, length, crc = _HEAD.unpack(head)
        record = os.pread(self._descriptor, length, start + _HEAD.size)
        return (number, record) if number and len(record) == length and zlib.crc32(record) == crc else None


def new_memory() -> int:
    """Return a descriptor of memory for ``Records`` (Linux, memfd_create(2)); the caller closes it."""
    return os.memfd_create("bnexport")


def _offset(slot: int, index: int) -> int:
    return _BEATS + (2 * slot + index) * _PLACE


Key = tuple[str, str]
#: Time between periodic publications, in multiples of the time that one takes.
_SPARE = 20.0


@dataclass
class ModelTotals:
    """Totals of one version of one model."""

    ready: bool | None  # True if it answers in every process that has it; None if no process has it
    waiting: int = 0  # Requests in its queues
    sessions: int = 0  # Number of the engine's sessions
    statistics: ModelStatistics | None = None  # Its counters; None if it is not served

    def merge(self, other: ModelTotals) -> None:
        """Add another process's totals."""
        known = [ready for ready in (self.ready, other.ready) if ready is not None]
        self.ready = all(known) if known else None
        self.waiting += other.waiting
        self.sessions += other.sessions
        if other.statistics is not None:
            self.statistics = self.statistics or ModelStatistics()
            self.statistics.merge(other.statistics)


@dataclass
class Totals:
    """Totals of a process, or of several."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # (route, status) -> requests over HTTP
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)  # (method, code) -> calls over gRPC
    active: int = 0  # Requests and calls that are being answered
    calls_active: int = 0  # Calls that are being answered
    models: dict[Key, ModelTotals] = field(default_factory=dict)  # (name, version) -> its totals
    # Number -> process id of the running processes; empty for a single process
    processes: dict[int, int] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)  # Number -> starts of that process

    def merge(self, other: Totals) -> None:
        """Add another process's totals without changing them."""
        self.requests.update(other.requests)
        self.calls.update(other.calls)
        self.active += other.active
        self.calls_active += other.calls_active
        self.processes |= other.processes
        self.starts |= other.starts
        for key, found in other.models.items():
            self.models.setdefault(key, ModelTotals(ready=None)).merge(found)

    def ended(self) -> Totals:
        """Return the totals of an ended process: its counts, but neither its queues nor its readiness."""
        models = {key: ModelTotals(ready=None, statistics=found.statistics) for key, found in self.models.items()}
        return Totals(self.requests, self.calls, models=models, starts=self.starts)


class Share:
    """Publishes the counters of one process of several; its successor continues them.

    Counters never fall. A restarted process continues from its predecessor's counters. A process writes its counters before it
    reports them, so every other process reports at least as much afterwards. Counts of the other processes in the last tenth of
    a second may be missing. ``slot`` is this process's number, ``slots`` the number of processes.
    """

    def __init__(self, records: Records, slot: int, slots: int) -> None:
        self._records, self.slot, self._slots = records, slot, slots
        self._before = read_totals(records, slot).ended()
        self._counted: dict[Key, ModelStatistics] = {}
        self._written = b""
        self._due_at = 0.0

    def beat(self) -> None:
        """Write a heartbeat."""
        self._records.beat(self.slot)

    def due(self) -> bool:
        """Return True if it is time to publish: ten times a second, or less often with very many models."""
        return time.monotonic() >= self._due_at

    def publish(self, own: Totals) -> Totals:
        """Write and return the totals of this process and its predecessors."""
        start = time.monotonic()
        self._keep_replaced(own)
        total = Totals(processes={self.slot: os.getpid()})
        total.merge(_of_known(self._before, own))
        total.merge(own)
        record = pickle.dumps(total)
        if record != self._written and self._records.write(self.slot, record):
            self._written = record
        end = time.monotonic()
        self._due_at = end + _SPARE * (end - start)
        return total

    def together(self, own: Totals) -> Totals:
        """Return the totals of all processes."""
        total = Totals()
        total.merge(self.publish(own))
        for slot in range(self._slots):
            if slot != self.slot:
                total.merge(read_totals(self._records, slot))
        return total

    def _keep_replaced(self, own: Totals) -> None:
        """Keep the counts of a version that was loaded again: its new counters start at zero."""
        for key, found in own.models.items():
            if found.statistics is None:
                continue
            old = self._counted.get(key)
            if old is not None and old is not found.statistics:
                self._before.merge(Totals(models={key: ModelTotals(ready=None, statistics=old)}))
            self._counted[key] = found.statistics


def _of_known(before: Totals, own: Totals) -> Totals:
    """Return the earlier counts, limited to versions that are served now."""
    served = {key for key, found in own.models.items() if found.statistics is not None}
    models = {key: found for key, found in before.models.items() if key in served}
    return Totals(before.requests, before.calls, models=models, starts=before.starts)


def read_totals(records: Records, slot: int) -> Totals:
    """Read a slot's record; empty totals before the first."""
    record = records.read(slot)
    if record is None:
        return Totals()
    totals: Totals = pickle.loads(record)  # noqa: S301 -- only this server's processes can write the memory
    return totals


def note_start(records: Records, slot: int) -> None:
    """Count the start of a slot's process, before it starts."""
    totals = read_totals(records, slot).ended()
    totals.starts[slot] = totals.starts.get(slot, 0) + 1
    records.write(slot, pickle.dumps(totals))


def note_end(records: Records, slot: int) -> None:
    """Record the end of a slot's process: it has no queue and no readiness."""
    records.write(slot, pickle.dumps(read_totals(records, slot).ended()))
