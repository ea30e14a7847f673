"""What a server has counted, as one value: of this process, or of all that share a port."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from bnexport.serving.records import Records
from bnexport.serving.repository import Repository
from bnexport.serving.statistics import ModelStatistics

Key = tuple[str, str]
#: Publishing unasked may take one part in so many of the time.
_SPARE = 20.0


@dataclass
class ModelTotals:
    """Of one version of one model.

    Attributes:
        ready: Whether it answers, in every process that knows it; None where none does.
        waiting: Requests in its queues.
        sessions: Of the engine.
        statistics: Its counters; None where it is not served.
    """

    ready: bool | None
    waiting: int = 0
    sessions: int = 0
    statistics: ModelStatistics | None = None

    def merge(self, other: ModelTotals) -> None:
        """Add another process's."""
        known = [ready for ready in (self.ready, other.ready) if ready is not None]
        self.ready = all(known) if known else None
        self.waiting += other.waiting
        self.sessions += other.sessions
        if other.statistics is not None:
            self.statistics = self.statistics or ModelStatistics()
            self.statistics.merge(other.statistics)


@dataclass
class Totals:
    """Of a process, or of several.

    Attributes:
        requests: (route, status) -> requests over HTTP.
        calls: (method, code) -> calls over gRPC.
        active: Requests and calls that are being answered.
        calls_active: Calls that are being answered.
        models: (name, version) -> its totals.
        processes: Number -> process id of those that run; empty where there is one alone.
        starts: Number -> how often that process was started.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    active: int = 0
    calls_active: int = 0
    models: dict[Key, ModelTotals] = field(default_factory=dict)
    processes: dict[int, int] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)

    def merge(self, other: Totals) -> None:
        """Add another process's, which stays as it is."""
        self.requests.update(other.requests)
        self.calls.update(other.calls)
        self.active += other.active
        self.calls_active += other.calls_active
        self.processes |= other.processes
        self.starts |= other.starts
        for key, found in other.models.items():
            self.models.setdefault(key, ModelTotals(ready=None)).merge(found)

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "requests": [[route, status, count] for (route, status), count in self.requests.items()],
            "calls": [[method, code, count] for (method, code), count in self.calls.items()],
            "active": self.active,
            "calls_active": self.calls_active,
            "models": [
                [*key, m.ready, m.waiting, m.sessions, None if m.statistics is None else m.statistics.to_record()]
                for key, m in self.models.items()
            ],
            "processes": list(self.processes.items()),
            "starts": list(self.starts.items()),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Totals:
        """What ``to_record`` wrote."""
        return cls(
            Counter({(route, status): count for route, status, count in record["requests"]}),
            Counter({(method, code): count for method, code, count in record["calls"]}),
            record["active"],
            record["calls_active"],
            {
                (name, version): ModelTotals(
                    ready, waiting, sessions, None if counted is None else ModelStatistics.from_record(counted)
                )
                for name, version, ready, waiting, sessions, counted in record["models"]
            },
            dict(record["processes"]),
            dict(record["starts"]),
        )

    def ended(self) -> Totals:
        """What is left of a process that ended: what it has counted, but neither its queues nor its readiness."""
        models = {key: ModelTotals(ready=None, statistics=found.statistics) for key, found in self.models.items()}
        return Totals(self.requests, self.calls, models=models, starts=self.starts)


def models_of(repository: Repository) -> dict[Key, ModelTotals]:
    """The totals of this process's models; the counters are their own and go on counting."""
    models: dict[Key, ModelTotals] = {}
    for name, version, entry in repository.each():
        served = entry.served
        models[name, version] = (
            ModelTotals(ready=False)
            if served is None
            else ModelTotals(True, served.batcher.waiting, served.batcher.workers, served.statistics)
        )
    return models


class Share:
    """The counters of one process among several, kept where the others, and who takes its place, can read them.

    Counters never fall: a process that is started again goes on where its predecessor was, and whatever has been shown by
    one process was written before, so that the next one that is asked knows it. What the others counted in the last tenth
    of a second may be missing.

    Args:
        records: Of all processes.
        slot: This process's number.
        slots: How many there are.
    """

    def __init__(self, records: Records, slot: int, slots: int) -> None:
        self._records, self.slot, self._slots = records, slot, slots
        self._before = read_totals(records, slot).ended()
        self._counted: dict[Key, ModelStatistics] = {}
        self._written = b""
        self._due_at = 0.0

    def beat(self) -> None:
        """Show that this process is alive."""
        self._records.beat(self.slot)

    def due(self) -> bool:
        """Whether to publish unasked; with very many models, less often than ten times a second."""
        return time.monotonic() >= self._due_at

    def publish(self, own: Totals) -> Totals:
        """Write this process's totals with its predecessors' before; returns them."""
        start = time.monotonic()
        self._keep_replaced(own)
        total = Totals(processes={self.slot: os.getpid()})
        total.merge(_of_known(self._before, own))
        total.merge(own)
        record = orjson.dumps(total.to_record())
        if record != self._written and self._records.write(self.slot, record):
            self._written = record
        end = time.monotonic()
        self._due_at = end + _SPARE * (end - start)
        return total

    def together(self, own: Totals) -> Totals:
        """The totals of all processes."""
        total = Totals()
        total.merge(self.publish(own))
        for slot in range(self._slots):
            if slot != self.slot:
                total.merge(read_totals(self._records, slot))
        return total

    def _keep_replaced(self, own: Totals) -> None:
        """A version that was loaded again counts from zero; what it had counted before stays."""
        for key, found in own.models.items():
            if found.statistics is None:
                continue
            old = self._counted.get(key)
            if old is not None and old is not found.statistics:
                self._before.merge(Totals(models={key: ModelTotals(ready=None, statistics=old)}))
            self._counted[key] = found.statistics


def _of_known(before: Totals, own: Totals) -> Totals:
    """What was counted before, of the versions that are served now."""
    served = {key for key, found in own.models.items() if found.statistics is not None}
    models = {key: found for key, found in before.models.items() if key in served}
    return Totals(before.requests, before.calls, models=models, starts=before.starts)


def read_totals(records: Records, slot: int) -> Totals:
    """What a slot's record holds; nothing before the first."""
    record = records.read(slot)
    return Totals() if record is None else Totals.from_record(orjson.loads(record))


def note_start(records: Records, slot: int) -> None:
    """Count that a slot's process is started; to be called while it has none."""
    totals = read_totals(records, slot).ended()
    totals.starts[slot] = totals.starts.get(slot, 0) + 1
    records.write(slot, orjson.dumps(totals.to_record()))


def note_end(records: Records, slot: int) -> None:
    """Note that a slot's process has ended: it has no queue any more, and is not ready."""
    records.write(slot, orjson.dumps(read_totals(records, slot).ended().to_record()))
