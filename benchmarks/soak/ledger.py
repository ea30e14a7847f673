"""What the clients of a soak write down, many at a time."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

RIGHT, WRONG, LOST = "right", "wrong", "lost"
#: Faults of each sort that are kept word by word; more are counted.
_KEPT = 1000


@dataclass(frozen=True)
class Fault:
    """A request that did not get the answer that it should have.

    Attributes:
        kind: Of the request.
        reason: One sentence without its full stop.
        port: The client's port; None where there was no connection.
        started: When the request was begun, by ``time.monotonic``.
        ended: When the fault was seen.
    """

    kind: str
    reason: str
    port: int | None
    started: float
    ended: float


@dataclass
class Ledger:
    """Counts of all requests, and the faults.

    Attributes:
        counts: (kind, outcome) -> requests.
        wrong: Answers that were not the right ones: other numbers, another status.
        lost: Requests without an answer.
        fallen: Counters of the server that were less than before.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[Fault] = field(default_factory=list)
    lost: list[Fault] = field(default_factory=list)
    fallen: list[str] = field(default_factory=list)
    _highest: dict[str, float] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def right(self, kind: str) -> None:
        """Count a request that got what it should have."""
        with self._turn:
            self.counts[kind, RIGHT] += 1

    def add_wrong(self, fault: Fault) -> None:
        """Note an answer that is wrong."""
        with self._turn:
            self.counts[fault.kind, WRONG] += 1
            self.wrong += [fault] if len(self.wrong) < _KEPT else []

    def add_lost(self, fault: Fault) -> None:
        """Note a request that got no answer."""
        with self._turn:
            self.counts[fault.kind, LOST] += 1
            self.lost += [fault] if len(self.lost) < _KEPT else []

    def highest(self) -> dict[str, float]:
        """The server's counters as they were seen, at least; what is asked for from now on may not be less."""
        with self._turn:
            return dict(self._highest)

    def see(self, before: dict[str, float], now: dict[str, float]) -> None:
        """Compare counters with those of ``highest`` before they were asked for."""
        with self._turn:
            for name, value in now.items():
                if value < before.get(name, 0.0):
                    self.fallen.append(f"{name} fell from {before[name]:g} to {value:g}")
                self._highest[name] = max(value, self._highest.get(name, 0.0))

    def outcomes(self, outcome: str) -> int:
        """Requests with an outcome."""
        return sum(count for (_, found), count in self.counts.items() if found == outcome)
