"""Clients of a soak: threads that send requests and judge every answer, and the ledger of their results."""

from __future__ import annotations

import contextlib
import http.client
import re
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.soak.traffic import Request, Traffic

HOST = "127.0.0.1"
#: Seconds that an answer may take; longer than the restart of a process.
PATIENCE = 60.0
#: Mean seconds of the pauses in a slow request, and the share of requests on a new connection.
_SLOW, _FRESH = 0.1, 0.02
#: Counters that never fall, by their names in Prometheus's text.
_COUNTERS = ("bnexport_http_requests_total", "bnexport_samples_total", "bnexport_request_seconds_count")
RIGHT, WRONG, LOST = "right", "wrong", "lost"
#: Faults of each sort that are kept; more are counted.
_KEPT = 1000


@dataclass(frozen=True)
class Fault:
    """A request without the right answer; times are those of ``time.monotonic``."""

    kind: str
    reason: str  # one sentence without its full stop
    port: int | None  # the client's; None without a connection
    started: float
    ended: float


@dataclass
class Ledger:
    """Counts of all requests, and the faults; for many threads."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, outcome) -> requests
    wrong: list[Fault] = field(default_factory=list)  # answers with other numbers or another status
    lost: list[Fault] = field(default_factory=list)  # requests without an answer
    fallen: list[str] = field(default_factory=list)  # counters of the server that fell
    _highest: dict[str, float] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def right(self, kind: str) -> None:
        """Count a request with the right answer."""
        with self._turn:
            self.counts[kind, RIGHT] += 1

    def add(self, outcome: str, fault: Fault) -> None:
        """Note a wrong or a lost request."""
        with self._turn:
            self.counts[fault.kind, outcome] += 1
            kept = self.wrong if outcome == WRONG else self.lost
            kept += [fault] if len(kept) < _KEPT else []

    def highest(self) -> dict[str, float]:
        """Return the highest values of the server's counters so far, below which later answers may not fall."""
        with self._turn:
            return dict(self._highest)

    def see(self, before: dict[str, float], now: dict[str, float]) -> None:
        """Compare counters with those that ``highest`` returned before the request."""
        with self._turn:
            for name, value in now.items():
                if value < before.get(name, 0.0):
                    self.fallen.append(f"{name} fell from {before[name]:g} to {value:g}")
                self._highest[name] = max(value, self._highest.get(name, 0.0))

    def outcomes(self, outcome: str) -> int:
        """Return the number of requests with an outcome."""
        return sum(count for (_, found), count in self.counts.items() if found == outcome)


@dataclass
class Client:
    """One client, which keeps its connection as browsers and balancers do.

    A kept connection that the server has closed is given up before the next request.
    """

    port: int
    traffic: Traffic
    ledger: Ledger
    stop: threading.Event
    rng: np.random.Generator
    pause: float  # mean seconds between requests

    def __post_init__(self) -> None:
        self._connection = http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE)

    def run(self) -> None:
        """Send requests until the stop."""
        names, weights = list(ACTIONS), np.array([weight for weight, _ in ACTIONS.values()])
        with contextlib.closing(self._connection):
            while not self.stop.is_set():
                name = names[int(self.rng.choice(len(names), p=weights / weights.sum()))]
                ACTIONS[name][1](self)
                self.stop.wait(self.rng.exponential(self.pause))

    def good(self) -> None:
        """Send a request with a known answer."""
        request = self._any_good()
        self._send(request.name, request)

    def malformed(self) -> None:
        """Send a request that must be refused."""
        self._send("malformed", self.traffic.bad[int(self.rng.integers(len(self.traffic.bad)))])

    def slow(self) -> None:
        """Send a request with its body in pieces."""
        request = self._any_good()

        def pieces() -> Iterator[bytes]:
            for part in np.array_split(np.frombuffer(request.body, np.uint8), 4):
                time.sleep(float(self.rng.uniform(0, 2 * _SLOW)))
                yield part.tobytes()

        headers = {**request.headers, "content-length": str(len(request.body))}
        self._send("slow", replace(request, headers=headers), pieces())

    def broken_off(self) -> None:
        """Disconnect before a request, in the middle of it, or before the answer."""
        request = self._any_good()
        head = [f"POST {request.path} HTTP/1.1", "host: soak", f"content-length: {len(request.body)}"]
        head += [f"{name}: {value}" for name, value in request.headers.items()]
        data = "\r\n".join(head).encode() + b"\r\n\r\n" + request.body
        length = int(self.rng.choice([0, int(self.rng.integers(1, len(data))), len(data)]))
        try:
            with socket.create_connection((HOST, self.port), timeout=PATIENCE) as client:
                client.sendall(data[:length])
        except OSError as error:
            now = time.monotonic()
            self.ledger.add(LOST, Fault("broken off", f"no connection: {error}", None, now, now))
        else:
            self.ledger.right("broken off")

    def probe(self) -> None:
        """Check its health."""
        path = f"/v2/health/{self.rng.choice(['live', 'ready'])}"
        self._send("probe", Request("probe", 200, "GET", path, {}, b""))

    def metrics(self) -> None:
        """Read counters, which must not fall, whichever process answers."""
        before = self.ledger.highest()
        if (body := self._send("metrics", Request("metrics", 200, "GET", "/metrics", {}, b""))) is not None:
            self.ledger.see(before, counters(body.decode()))

    def _any_good(self) -> Request:
        kinds = list(self.traffic.good)
        requests = self.traffic.good[kinds[int(self.rng.integers(len(kinds)))]]
        return requests[int(self.rng.integers(len(requests)))]

    def _send(self, kind: str, request: Request, body: Iterator[bytes] | None = None) -> bytes | None:
        """Send one request, with its body in pieces if these are given, and note its result; return the right answer."""
        started, port = time.monotonic(), None
        try:
            port = self._connected().getsockname()[1]
            self._connection.request(request.method, request.path, body or request.body, dict(request.headers))
            answer = self._connection.getresponse()
            got = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            reason = f"{type(error).__name__}: {error}"
            self.ledger.add(LOST, Fault(kind, reason, port, started, time.monotonic()))
            return None
        headers = {name.lower(): value for name, value in answer.getheaders()}
        if problem := self.traffic.problem(request, answer.status, headers, got):
            problem = problem if kind == request.name else f"{request.name}: {problem}"
            self.ledger.add(WRONG, Fault(kind, problem, port, started, time.monotonic()))
            return None
        self.ledger.right(kind)
        return got

    def _connected(self) -> socket.socket:
        """Return the kept connection, or a new one."""
        kept: socket.socket | None = self._connection.sock
        if kept is not None and (self.rng.random() < _FRESH or select.select([kept], [], [], 0)[0]):
            self._connection.close()
        if self._connection.sock is None:
            self._connection.connect()
        return self._connection.sock


#: Action of a client -> (weight, method).
ACTIONS: dict[str, tuple[int, Callable[[Client], None]]] = {
    "good": (70, Client.good),
    "malformed": (12, Client.malformed),
    "slow": (2, Client.slow),
    "broken off": (5, Client.broken_off),
    "probe": (8, Client.probe),
    "metrics": (3, Client.metrics),
}


def counters(text: str) -> dict[str, float]:
    """Return the sums of some counters over their labels, from Prometheus's text format."""
    found = dict.fromkeys(_COUNTERS, 0.0)
    for name, value in re.findall(r"^(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        if name in found:
            found[name] += float(value)
    return found
