"""Several processes on one port, and one that opens no model, which starts them, watches them, and stops them.

Each process has a socket of its own on the port (SO_REUSEPORT), and the supervisor holds every socket open. With one socket
for all, whoever wakes first takes what waits: of 64 connections that came one by one, 15 times over, one of two processes got
all at worst, and a client that keeps its connection keeps the imbalance. With a socket each, the system spreads them by a hash
(at least a third for each in the same measurement). What waits in the backlog of a killed process is lost where only that
process holds its socket: 15 of 40 connections, and none of 40 where the supervisor holds it, too; its successor answers them.
(Linux 6.18, uvloop 0.23, two cores, loopback.)
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FrameType

from bnexport.errors import NotServing, RuntimeUnavailable, UsageError
from bnexport.optional import one_line
from bnexport.runtimes.isolation import how_ended, import_path
from bnexport.serving.access_log import JsonLog
from bnexport.serving.counters import Records, new_memory, note_end, note_start
from bnexport.serving.http.http_server import ServerSettings
from bnexport.serving.http.worker import BLOCKED, PATIENCE, STOPPING, WorkerTask
from bnexport.serving.listener import bound, free_port

_WORKER = "bnexport.serving.http.worker"
#: Seconds after which a process that served counts as sound: its end is no reason to wait with the next one.
_SOUND = 10.0
#: Seconds before a new start: the first of them that follow each other, and the longest. Connections wait for a process that
#: has served before, so it may not be away for as long as one that could not start, whose share the others get.
_PAUSE, _LONGEST_WAIT, _LONGEST_PAUSE = 0.25, 5.0, 30.0
#: Starts in a row of one process that fail while no other one serves, before the supervisor gives up.
_STARTS = 5
#: Seconds between looks at the heartbeats, and looks in a row without a new one after which a process that serves is killed.
#: Engines and loading have threads of their own, so the loop that beats is never away for long. Looks are counted, not
#: seconds: where everybody stood still, as in a container that is paused, nobody is to blame.
_LOOK, _SILENT = 1.0, 60
#: Seconds for the system to take a process away once it has closed its line.
_REAP = 5.0


@dataclass
class _Seat:
    """One of the processes, or its place while it does not run."""

    number: int  # Number of the process, from 0
    listener: socket.socket | None = None  # Its socket; None while no client should connect to it
    process: subprocess.Popen[bytes] | None = None  # The running process, if there is one
    line: Connection | None = None  # To the process
    # Time at which it began to serve, by ``time.monotonic``; None while it does not serve
    ready_at: float | None = None
    failures: int = 0  # Consecutive ends before it was sound
    vain: int = 0  # Consecutive starts that never became ready
    start_at: float | None = None  # Time of the next start
    error: Exception | None = None  # Error of its last failed start
    started_at: float = 0.0  # Time of its last start, by ``time.monotonic``
    beat: bytes = b""  # Its heartbeat at the last check
    silent: int = 0  # Consecutive checks without a new heartbeat


def supervise(path: Path, settings: ServerSettings, *, announce: Callable[[str], None]) -> None:
    """Serve by ``settings.models.processes`` processes until SIGTERM or Ctrl-C.

    Args:
        path: A bundle, or a folder of models.
        settings: Options of each of them.
        announce: Called with one sentence once all of them serve.

    Raises:
        BnexportError: The first one's error, as with one process; or no process can be started any more.
        KeyboardInterrupt: It was stopped before all of them served.
        NotServing: A process did not stop in time, and was killed.
        RuntimeUnavailable: The system can't share a port.
        UsageError: The port can't be had, or the settings do not go with several processes.
    """
    if settings.allow_load:
        raise UsageError(
            "a request to load or unload a model reaches one process of several alone",
            remedy="Leave out --allow-load or --processes; --poll looks for new versions in each process",
        )
    if not sys.platform.startswith("linux"):
        raise RuntimeUnavailable(
            "only Linux spreads the connections to a port among processes", remedy="Leave out --processes"
        )
    log = JsonLog(sys.stderr, access=settings.access_log)
    try:
        Supervisor(path, settings, log, announce).run()
    finally:
        log.close()


class Supervisor:
    """Starts, watches and stops the processes; see ``supervise``."""

    def __init__(self, path: Path, settings: ServerSettings, log: JsonLog, announce: Callable[[str], None]) -> None:
        self._path, self._log, self._announce = path, log, announce
        # Who did not ask to share a port must not get one that is taken.
        port, grpc_port = free_port(settings.host, settings.port, reuse=settings.reuse_port), settings.grpc_port
        if grpc_port is not None:
            grpc_port = free_port(settings.host, grpc_port, reuse=settings.reuse_port, option="--grpc-port")
        self._settings = replace(settings, port=port, grpc_port=grpc_port, reuse_port=True)
        self._seats = [_Seat(number) for number in range(settings.models.processes)]
        self._announced = False
        self._stops = 0
        self._stop_seen = 0
        self._deadline = math.inf
        self._look_at = 0.0
        self._killed: list[int] = []

    def run(self) -> None:
        """Run until all processes have stopped."""
        self._memory = new_memory()
        self._records = Records(self._memory)
        try:
            with self._signals() as woken:
                for seat in self._seats:
                    seat.listener = self._bound()
                self._start(self._seats[0])  # what is wrong with the models, one process tells as well as all
                while self._stop_seen == 0 or any(seat.process for seat in self._seats):
                    self._turn(woken)
        finally:
            self._clear()
        if self._killed:
            raise NotServing(
                f"processes {', '.join(map(str, self._killed))} did not stop in time and were killed",
                remedy="Give them more --grace",
            )
        if not self._announced:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _signals(self) -> Iterator[socket.socket]:
        """Count SIGTERM and SIGINT; the socket becomes readable with each."""
        reader, writer = socket.socketpair()

        def note(_number: int, _frame: FrameType | None) -> None:
            self._stops += 1
            with contextlib.suppress(OSError):
                writer.send(b"x")

        writer.setblocking(False)
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with reader, writer:
                yield reader
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _turn(self, woken: socket.socket) -> None:
        """Wait for the next event, and handle it."""
        lines = {seat.line: seat for seat in self._seats if seat.line is not None}
        due = [seat.start_at for seat in self._seats if seat.start_at is not None]
        next_time = min([*due, self._deadline, self._look_at])
        happened = wait([*lines, woken], max(0.0, next_time - time.monotonic()))
        if woken in happened:
            woken.recv(64)
        self._heed_signals()
        for line, seat in lines.items():
            if line in happened:
                self._hear(seat, line)
        now = time.monotonic()
        for seat in self._seats:
            if seat.start_at is not None and now >= seat.start_at:
                self._start(seat)
        if now >= self._look_at:
            self._look_at = now + _LOOK
            self._kill_hanging()
        if now >= self._deadline:
            self._kill_late()

    def _heed_signals(self) -> None:
        """Start the drain at the first signal, end it at the second."""
        while self._stop_seen < self._stops:
            self._stop_seen += 1
            first = self._stop_seen == 1
            self._log.event("stopping", at_once=not first)
            self._deadline = min(self._deadline, time.monotonic() + self._settings.grace + PATIENCE)
            for seat in self._seats:
                seat.start_at = None
                # Each process closes its own; one that is held here would keep the system sending connections to it.
                self._close_listener(seat)
                if seat.process is not None:
                    seat.process.send_signal(self._signal(first=first))

    def _signal(self, *, first: bool) -> signal.Signals:
        """Return the signal that stops a process; before all were announced, processes are killed."""
        if not self._announced:
            return signal.SIGKILL
        return signal.SIGTERM if first else signal.SIGINT

    def _start(self, seat: _Seat) -> None:
        """Start a process: no fork, which inherits libraries, nor multiprocessing, which imports the user's script."""
        seat.start_at, seat.started_at, seat.error, seat.silent = None, time.monotonic(), None, 0
        if seat.listener is None:
            seat.listener = self._bound()
        note_start(self._records, seat.number)
        ours, theirs = Pipe()
        seat.line = ours
        descriptors = (theirs.fileno(), seat.listener.fileno(), self._memory)
        with theirs:
            # -P: nothing in the working directory may stand in for a package. A group of its own: Ctrl-C is ours to hear.
            try:
                with _blocked():
                    seat.process = subprocess.Popen(
                        [sys.executable, "-P", "-m", _WORKER, str(theirs.fileno())],
                        stdin=subprocess.DEVNULL, pass_fds=descriptors, process_group=0,
                        env={**os.environ, "PYTHONPATH": import_path()},
                    )  # fmt: skip
            except OSError as error:
                ours.close()
                seat.line = None
                seat.error = RuntimeUnavailable(
                    f"no process can be started: {one_line(error)}", remedy="Look at memory and the limit of processes"
                )
                self._try_again(seat, served=None, how="not started", pid=None)
                return
        self._log.event("process started", process=seat.number, pid=seat.process.pid)
        with contextlib.suppress(OSError):  # it is dead already, which its line will tell
            ours.send(WorkerTask(seat.number, *descriptors[1:], self._path, self._settings))

    def _hear(self, seat: _Seat, line: Connection) -> None:
        try:
            told = line.recv()
        except (EOFError, OSError):
            self._ended(seat)
            return
        if isinstance(told, Exception):
            seat.error = told
            return
        if told == STOPPING:
            # Perhaps it alone was told to. It makes its socket deaf, so its successor needs another one; while nobody holds
            # this one, the system sends new connections to the others.
            self._close_listener(seat)
            return
        assert seat.process is not None
        seat.ready_at = time.monotonic()
        taken = round(seat.ready_at - seat.started_at, 3)
        self._log.event("process ready", process=seat.number, pid=seat.process.pid, seconds=taken)
        if self._announced or self._stop_seen:
            return
        for other in self._seats:
            if other.process is None and other.start_at is None:
                self._start(other)
        if all(other.ready_at is not None for other in self._seats):
            self._announced = True
            self._announce(str(told))

    def _ended(self, seat: _Seat) -> None:
        process, served = seat.process, seat.ready_at
        assert process is not None
        how = how_ended(self._reaped(seat))
        note_end(self._records, seat.number)
        if self._stop_seen:
            self._log.event("process stopped", process=seat.number, pid=process.pid, how=how)
        else:
            self._try_again(seat, served=served, how=how, pid=process.pid)

    def _try_again(self, seat: _Seat, *, served: float | None, how: str, pid: int | None) -> None:
        """Schedule a new start, after a pause if this process did not serve for long."""
        sound = served is not None and time.monotonic() - served >= _SOUND
        seat.failures = 0 if sound else seat.failures + 1
        seat.vain = seat.vain + 1 if served is None else 0
        pause = _pause(seat.failures, served=served is not None)
        reason = {} if seat.error is None else {"reason": str(seat.error)}
        self._log.event("process died", process=seat.number, pid=pid, how=how, **reason, restart_in=pause)
        if not self._announced or (seat.vain >= _STARTS and all(other.ready_at is None for other in self._seats)):
            when = "before it could serve" if served is None else "while the others were started"
            raise seat.error or NotServing(
                f"process {seat.number} ended {when}: {how}", remedy="Look into the log, and at the memory"
            )
        if served is None:
            self._close_listener(seat)  # nobody may wait there for one that perhaps never comes
        seat.start_at = time.monotonic() + pause

    def _reaped(self, seat: _Seat) -> int:
        """Return the return code of a process whose line is closed; it is killed if it lingers."""
        process, line = seat.process, seat.line
        assert process is not None
        assert line is not None
        line.close()
        try:
            code = process.wait(_REAP)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        seat.process = seat.line = seat.ready_at = None
        return code

    def _kill_hanging(self) -> None:
        """Kill processes that serve but show no heartbeat; a stop has its own deadline."""
        for seat in self._seats:
            if seat.process is None or seat.ready_at is None or self._stop_seen:
                continue
            beat = self._records.heartbeat(seat.number)
            seat.silent = seat.silent + 1 if beat == seat.beat else 0
            seat.beat = beat
            if seat.silent == _SILENT:
                seat.error = NotServing(
                    f"it showed no life for {_LOOK * _SILENT:g} seconds and was killed", remedy="Look what it did then"
                )
                seat.process.kill()

    def _kill_late(self) -> None:
        """Kill processes that should have stopped."""
        self._deadline = math.inf
        for seat in self._seats:
            if seat.process is not None:
                self._killed.append(seat.number)
                seat.process.kill()

    def _bound(self) -> socket.socket:
        return bound(self._settings.host, self._settings.port, reuse=True)

    def _close_listener(self, seat: _Seat) -> None:
        if seat.listener is not None:
            seat.listener.close()
            seat.listener = None

    def _clear(self) -> None:
        """Close and stop everything, whatever happened."""
        for seat in self._seats:
            self._close_listener(seat)
            if seat.process is not None:
                seat.process.kill()
                self._reaped(seat)
        os.close(self._memory)


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Block signals: processes that start in the block receive those in ``BLOCKED`` when they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pause(failures: int, *, served: bool) -> float:
    """Return the seconds before the next start: none after one end of a process that served, doubled after each further one."""
    if served and failures <= 1:
        return 0.0
    return min(_PAUSE * 2.0 ** min(failures - 1, 10), _LONGEST_WAIT if served else _LONGEST_PAUSE)
