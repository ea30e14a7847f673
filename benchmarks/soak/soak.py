"""A soak: clients, a server of several processes, and kills of its processes.

A killed process is stopped for some milliseconds first, and its accepted connections are read from proc(5). A request may be
lost only on one of these connections, and only if it began before the system had closed them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks.serving.process import resident, stat_of
from benchmarks.soak.clients import Client, Fault, Ledger
from benchmarks.soak.server import ServerUnderSoak, kill_and_see, serving
from benchmarks.soak.traffic import make_traffic
from bnexport.bundle import Bundle
from bnexport.errors import UsageError

#: Seconds between two reads of the log, between two lines of progress, and without a kill at the end.
_LOOK, _TELL, _CALM = 0.1, 30.0, 2.0
#: Seconds for the restart of a process, and for the end of the clients.
_RECOVERY, _END = 60.0, 90.0
#: Relative variation of the time between kills.
_JITTER = 0.2


@dataclass(frozen=True)
class SoakSettings:
    """The settings of a soak."""

    seconds: float = 600.0  # of traffic
    processes: int = 2
    clients: int = 8  # each has one request at a time
    seed: int = 0  # of the requests, their order, and the kills
    kill_every: float | None = 20.0  # mean seconds between kills; None: no kills
    pause: float = 0.01  # mean seconds between two requests of a client
    options: tuple[str, ...] = ()  # more words for ``bnexport serve``


@dataclass
class Kill:
    """One process killed by SIGKILL; times are those of ``time.monotonic``."""

    process: int
    pid: int
    begun: float  # it was stopped
    done: float  # the system had closed its connections
    ports: frozenset[int]  # the clients' ports of its accepted connections
    recovery: float | None = None  # seconds until its replacement served

    def explains(self, fault: Fault) -> bool:
        """Return True if a lost request was on a connection of the killed process."""
        return fault.port in self.ports and fault.started <= self.done and fault.ended >= self.begun


@dataclass
class ProcessMemory:
    """Resident bytes of one process: when it became ready, at the end, and at most."""

    process: int
    pid: int
    first: int
    last: int
    most: int


@dataclass
class Soak:
    """The results of a soak."""

    settings: SoakSettings
    seconds: float = 0.0  # of traffic
    ledger: Ledger = field(default_factory=Ledger)
    kills: list[Kill] = field(default_factory=list)
    died: list[str] = field(default_factory=list)  # processes that ended without a kill
    memory: dict[int, ProcessMemory] = field(default_factory=dict)  # by process id
    exit_code: int | None = None  # of the server; None if it did not stop
    left: list[int] = field(default_factory=list)  # process ids that ran after the stop
    stuck: int = 0  # clients that did not end


def run_soak(bundle: Bundle, settings: SoakSettings, *, on_line: Callable[[str], None] = lambda _: None) -> Soak:
    """Soak an image classifier; ``on_line`` gets lines of progress.

    BundleError: the bundle is not an image classifier in float32. Unavailable: the engine does not work here, or the server
    did not start. UsageError: the settings have fewer than two processes, or no client or time.
    """
    if settings.processes < 2 or settings.clients < 1 or settings.seconds <= 0:
        problem = "a soak needs a server of two processes at least, a client and some seconds"
        raise UsageError(problem, remedy="Give more of them")
    traffic = make_traffic(bundle, settings.seed)
    soak, stop = Soak(settings), threading.Event()
    with serving(bundle.path, settings.processes, settings.options) as server:
        first, *others = map(np.random.default_rng, np.random.SeedSequence(settings.seed).spawn(settings.clients + 1))
        clients = [Client(server.port, traffic, soak.ledger, stop, rng, settings.pause) for rng in others]
        threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
        try:
            _Watch(soak, server, first, on_line).run(threads)
        finally:
            stop.set()
        end = time.monotonic() + _END
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        soak.stuck = sum(thread.is_alive() for thread in threads)
        soak.exit_code = server.stop()
        soak.left = server.left()
    return soak


class _Watch:
    """Watches the server under traffic, and kills its processes."""

    def __init__(
        self, soak: Soak, server: ServerUnderSoak, rng: np.random.Generator, on_line: Callable[[str], None]
    ) -> None:
        self._soak, self._server, self._rng, self._on_line = soak, server, rng, on_line

    def run(self, clients: list[threading.Thread]) -> None:
        """Run the traffic to its end and to the last recovery."""
        settings = self._soak.settings
        self._until(lambda: len(self._server.pids) == settings.processes, _RECOVERY)
        start = time.monotonic()
        for client in clients:
            client.start()
        shown, next_kill = start, start + self._gap()
        while (now := time.monotonic()) < start + settings.seconds and self._server.process.poll() is None:
            self._look()
            if now >= next_kill and now < start + settings.seconds - _CALM and not self._recovering():
                self._kill()
                next_kill = now + self._gap()
            if now - shown >= _TELL:
                shown = now
                self._on_line(self._progress(now - start))
            time.sleep(_LOOK)
        self._soak.seconds = time.monotonic() - start
        self._until(lambda: not self._recovering(), _RECOVERY)
        self._look()

    def _gap(self) -> float:
        every = self._soak.settings.kill_every
        return float("inf") if every is None else every * float(self._rng.uniform(1 - _JITTER, 1 + _JITTER))

    def _until(self, done: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end and self._server.process.poll() is None:
            self._look()
            time.sleep(_LOOK)

    def _recovering(self) -> bool:
        return any(kill.recovery is None for kill in self._soak.kills)

    def _look(self) -> None:
        """Read the log, and the memory of every process."""
        for event in self._server.new_events():
            what, number = event.get("event"), event.get("process")
            if what == "process died" and event["pid"] not in {kill.pid for kill in self._soak.kills}:
                self._soak.died.append(f"process {number} (pid {event['pid']}): {event['how']}")
            if what == "process ready":
                for kill in self._soak.kills:
                    if kill.process == number and kill.recovery is None and event["pid"] != kill.pid:
                        kill.recovery = time.monotonic() - kill.done
        for number, pid in self._server.pids.items():
            if size := resident(stat_of(pid)):
                memory = self._soak.memory.setdefault(pid, ProcessMemory(number, pid, size, size, size))
                memory.last, memory.most = size, max(memory.most, size)

    def _kill(self) -> None:
        numbers = sorted(self._server.pids)
        number = numbers[int(self._rng.integers(len(numbers)))]
        pid, begun = self._server.pids.pop(number), time.monotonic()
        try:
            ports = kill_and_see(pid, self._server.port)
        except OSError:  # it had ended before, which the log reports
            return
        self._soak.kills.append(Kill(number, pid, begun, time.monotonic(), ports))

    def _progress(self, seconds: float) -> str:
        ledger, kills = self._soak.ledger, len(self._soak.kills)
        found = (
            f"{sum(ledger.counts.values())} requests, {len(ledger.wrong)} wrong, {len(ledger.lost)} without an answer"
        )
        return f"{seconds:.0f} s: {found}, {kills} kills"
