"""A soak: clients, a server of several processes, and a hand that kills one of them now and then.

Which requests a kill explains is not guessed. The process is stopped for some milliseconds, the connections that it has
accepted are read from proc(5), and then it is killed: a request may be lost only on one of these connections, and only if it
was begun before the system had closed them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks.soak.clients import Client
from benchmarks.soak.ledger import Fault, Ledger
from benchmarks.soak.processes import kill_and_see, resident
from benchmarks.soak.server import ServerUnderSoak, serving
from benchmarks.soak.traffic import make_traffic
from bnexport import interrupts
from bnexport.bundle import Bundle
from bnexport.errors import UsageError

#: Seconds between two looks at the server, between two lines of progress, and without a kill at the end.
_LOOK, _TELL, _CALM = 0.1, 30.0, 2.0
#: Seconds for a process to be there again, and for clients to come to their end.
_RECOVERY, _END = 60.0, 90.0
#: Kills come as far apart as was asked, give or take this share.
_JITTER = 0.2


@dataclass(frozen=True)
class SoakSettings:
    """What is done.

    Attributes:
        seconds: Of traffic.
        processes: Of the server.
        clients: Each has one request at a time.
        seed: Of the requests, their order, and who is killed when.
        kill_every: Seconds between kills, on average; None kills nobody.
        pause: Seconds between two requests of a client, on average.
        options: More words for ``bnexport serve``.
    """

    seconds: float = 600.0
    processes: int = 2
    clients: int = 8
    seed: int = 0
    kill_every: float | None = 20.0
    pause: float = 0.01
    options: tuple[str, ...] = ()


@dataclass
class Kill:
    """One process killed by SIGKILL.

    Attributes:
        process: Its number.
        pid: Its process id.
        begun: When it was stopped, by ``time.monotonic``.
        done: When the system had closed its connections.
        ports: The clients' ports of the connections that it had accepted.
        recovery: Seconds until another process served in its place; None when none did.
    """

    process: int
    pid: int
    begun: float
    done: float
    ports: frozenset[int]
    recovery: float | None = None

    def explains(self, fault: Fault) -> bool:
        """Whether a lost request was in the killed process's hands."""
        return fault.port in self.ports and fault.started <= self.done and fault.ended >= self.begun


@dataclass
class Memory:
    """Resident bytes of one process: when it was first seen ready, at the end, and at most."""

    process: int
    pid: int
    first: int
    last: int
    most: int


@dataclass
class Soak:
    """What happened.

    Attributes:
        settings: What was asked for.
        seconds: Of traffic.
        ledger: Of the clients.
        kills: In their order.
        died: Processes that ended though nobody killed them: the events of the log.
        memory: Process id -> its memory.
        exit_code: Of the server at the end; None when it did not stop.
        left: Process ids that were still there after that.
        stuck: Clients that did not come to their end.
    """

    settings: SoakSettings
    seconds: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)
    kills: list[Kill] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    memory: dict[int, Memory] = field(default_factory=dict)
    exit_code: int | None = None
    left: list[int] = field(default_factory=list)
    stuck: int = 0


@interrupts.terminable()
def run_soak(bundle: Bundle, settings: SoakSettings, *, tell: Callable[[str], None] = lambda _: None) -> Soak:
    """Run it.

    Args:
        bundle: An image classifier.
        settings: What to do.
        tell: Called with a line about the progress, now and then.

    Raises:
        BundleError: The bundle is no image classifier in float32.
        Unavailable: The engine does not work here, or the server did not start.
        UsageError: There is one process alone: nobody would serve while it is killed.
    """
    if settings.processes < 2 or settings.clients < 1 or settings.seconds <= 0:
        raise UsageError(
            "a soak needs a server of two processes at least, a client and some seconds", remedy="Give more of them"
        )
    traffic = make_traffic(bundle, settings.seed)
    soak, stop = Soak(settings), threading.Event()
    with serving(bundle.path, settings.processes, settings.options) as server:
        seeds = np.random.SeedSequence(settings.seed).spawn(settings.clients + 1)
        clients = [
            Client(
                server.port,
                traffic,
                ledger=soak.ledger,
                stop=stop,
                rng=np.random.default_rng(seed),
                pause=settings.pause,
            )
            for seed in seeds[1:]
        ]
        try:
            _Watch(soak, server, np.random.default_rng(seeds[0]), tell).run(clients)
        finally:
            stop.set()
        end = time.monotonic() + _END
        for client in clients:
            client.join(max(0.0, end - time.monotonic()))
        soak.stuck = sum(client.is_alive() for client in clients)
        soak.exit_code = server.stop()
        soak.left = server.left()
    return soak


class _Watch:
    """Looks after the server while the clients ask, and kills its processes."""

    def __init__(
        self, soak: Soak, server: ServerUnderSoak, rng: np.random.Generator, tell: Callable[[str], None]
    ) -> None:
        self._soak, self._server, self._rng, self._tell = soak, server, rng, tell

    def run(self, clients: list[Client]) -> None:
        """From the first request until the traffic has lasted long enough, and nobody is missing."""
        settings = self._soak.settings
        self._until(lambda: len(self._server.pids) == settings.processes, _RECOVERY)
        start = time.monotonic()
        for client in clients:
            client.start()
        told, next_kill = start, start + self._gap()
        while (now := time.monotonic()) < start + settings.seconds and self._server.process.poll() is None:
            self._look()
            if now >= next_kill and now < start + settings.seconds - _CALM and not self._recovering():
                self._kill()
                next_kill = now + self._gap()
            if now - told >= _TELL:
                told = now
                self._tell(self._progress(now - start))
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
        """What the log says, and how much memory everybody has."""
        for event in self._server.new_events():
            what, number = event.get("event"), event.get("process")
            if what == "process died" and event["pid"] not in {kill.pid for kill in self._soak.kills}:
                self._soak.died.append(f"process {number} (pid {event['pid']}): {event['how']}")
            if what == "process ready":
                for kill in self._soak.kills:
                    if kill.process == number and kill.recovery is None and event["pid"] != kill.pid:
                        kill.recovery = time.monotonic() - kill.done
        for number, pid in self._server.pids.items():
            if size := resident(pid):
                memory = self._soak.memory.setdefault(pid, Memory(number, pid, size, size, size))
                memory.last, memory.most = size, max(memory.most, size)

    def _kill(self) -> None:
        numbers = sorted(self._server.pids)
        number = numbers[int(self._rng.integers(len(numbers)))]
        pid, begun = self._server.pids.pop(number), time.monotonic()
        try:
            ports = kill_and_see(pid, self._server.port)
        except OSError:  # it had ended by itself, which the log tells
            return
        self._soak.kills.append(Kill(number, pid, begun, time.monotonic(), ports))

    def _progress(self, seconds: float) -> str:
        ledger = self._soak.ledger
        asked = sum(ledger.counts.values())
        return (
            f"{seconds:.0f} s: {asked} requests, {len(ledger.wrong)} wrong, {len(ledger.lost)} without an answer, "
            f"{len(self._soak.kills)} kills"
        )
