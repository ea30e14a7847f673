"""Several processes on one port, and a supervisor without models that starts, watches and stops them.

Each process has its own socket on the port (SO_REUSEPORT), and the supervisor holds every socket open. With one shared socket,
the process that wakes first accepts all waiting connections: in the worst of 15 runs with 64 consecutive connections, one of
two processes got all, and clients that keep their connection keep the imbalance. With separate sockets, the system distributes
connections by a hash (at least a third per process in the same measurement). The connections in the backlog of a killed process
are lost if only that process holds the socket: 15 of 40. None of 40 was lost if the supervisor holds the socket too: the
successor answers them. (Linux 6.18, uvloop 0.23, two cores, loopback.)
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

from bnexport import interrupts
from bnexport.errors import NotServing, RuntimeUnavailable, UsageError
from bnexport.optional import one_line
from bnexport.runtimes.isolation import how_ended, import_path
from bnexport.serving.access_log import JsonLog
from bnexport.serving.counters import Records, new_memory, note_end, note_start
from bnexport.serving.http.http_server import ServerSettings
from bnexport.serving.http.worker import BLOCKED, PATIENCE, STOPPING, WorkerTask
from bnexport.serving.listener import bound, free_port

_WORKER = "bnexport.serving.http.worker"
#: Seconds of serving after which a process counts as sound: after its end, the next one starts without a pause.
_SOUND = 10.0
#: Seconds before a new start: the first pause, the longest for a process that has served, and the longest for one that never
#: served. Connections wait for a process that has served; the share of one that never served goes to the others.
_PAUSE, _LONGEST_WAIT, _LONGEST_PAUSE = 0.25, 5.0, 30.0
#: Consecutive failed starts of one process, while no other one serves, before the supervisor gives up.
_STARTS = 5
#: Seconds between checks of the heartbeats, and consecutive checks without a new one after which a serving process is killed.
#: Engines and loading use separate threads, so the loop that beats is never blocked for long. Checks are counted instead of
#: seconds, so that a pause of the whole container kills no process.
_LOOK, _SILENT = 1.0, 60
#: Seconds for the end of a process after it has closed its pipe.
_REAP = 5.0


@dataclass
class _Seat:
    """One of the processes, or the place of one that does not run."""

    number: int  # Number of the process, from 0
    listener: socket.socket | None = None  # Its socket; None while clients should not connect to it
    process: subprocess.Popen[bytes] | None = None  # The running process; None without one
    line: Connection | None = None  # Pipe to the process
    ready_at: float | None = None  # Start of serving, by ``time.monotonic``; None while it does not serve
    failures: int = 0  # Consecutive ends before it was sound
    failed_starts: int = 0  # Consecutive starts that never became ready
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
        announce: Receives one sentence when all of them serve.

    Raises:
        BnexportError: The first process's error, as with a single process; or no process can be started any more.
        KeyboardInterrupt: The server was stopped before all processes served.
        NotServing: A process did not stop in time, and was killed.
        RuntimeUnavailable: The system can't share a port.
        UsageError: The port can't be used, or the settings do not allow several processes.
    """
    if settings.allow_load:
        raise UsageError(
            "a request to load or unload a model reaches only one of several processes",
            remedy="Omit --allow-load or --processes; with --poll, each process loads new versions",
        )
    if not sys.platform.startswith("linux"):
        raise RuntimeUnavailable(
            "only Linux distributes the connections to a port among processes", remedy="Omit --processes"
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
        # Without --reuse-port, a port in use must be refused.
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
        """Supervise until all processes have stopped."""
        self._memory = new_memory()
        self._records = Records(self._memory)
        try:
            with self._signals() as woken:
                for seat in self._seats:
                    seat.listener = self._bound()
                self._start(self._seats[0])  # one process reports all errors in the models
                while self._stop_seen == 0 or any(seat.process for seat in self._seats):
                    self._turn(woken)
        finally:
            self._clear()
        if self._killed:
            raise NotServing(
                f"processes {', '.join(map(str, self._killed))} did not stop in time and were killed",
                remedy="Give a longer --grace",
            )
        if not self._announced:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _signals(self) -> Iterator[socket.socket]:
        """Count SIGTERM and SIGINT; each makes the socket readable."""
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
        self._handle_signals()
        for line, seat in lines.items():
            if line in happened:
                self._receive(seat, line)
        now = time.monotonic()
        for seat in self._seats:
            if seat.start_at is not None and now >= seat.start_at:
                self._start(seat)
        if now >= self._look_at:
            self._look_at = now + _LOOK
            self._kill_hanging()
        if now >= self._deadline:
            self._kill_late()

    def _handle_signals(self) -> None:
        """Start the drain at the first signal, end it at the second."""
        while self._stop_seen < self._stops:
            self._stop_seen += 1
            first = self._stop_seen == 1
            self._log.event("stopping", at_once=not first)
            serving = signal.SIGTERM if first else signal.SIGINT
            self._deadline = min(self._deadline, time.monotonic() + self._settings.grace + PATIENCE)
            for seat in self._seats:
                seat.start_at = None
                # Each process closes its copy. If this copy stayed open, the system would still send connections to it.
                self._close_listener(seat)
                if seat.process is not None:
                    seat.process.send_signal(serving if self._announced else signal.SIGKILL)

    def _start(self, seat: _Seat) -> None:
        """Start a process. A fork would inherit libraries; multiprocessing would import the user's script."""
        seat.start_at, seat.started_at, seat.error, seat.silent = None, time.monotonic(), None, 0
        if seat.listener is None:
            seat.listener = self._bound()
        note_start(self._records, seat.number)
        ours, theirs = Pipe()
        seat.line = ours
        descriptors = (theirs.fileno(), seat.listener.fileno(), self._memory)
        with theirs:
            # -P: files in the working directory must not replace packages. A separate group: only the supervisor gets Ctrl-C.
            try:
                # Processes receive blocked signals when they unblock them.
                with interrupts.blocked(*BLOCKED):
                    seat.process = subprocess.Popen(
                        [sys.executable, "-P", "-m", _WORKER, str(theirs.fileno())],
                        stdin=subprocess.DEVNULL, pass_fds=descriptors, process_group=0,
                        env={**os.environ, "PYTHONPATH": import_path()},
                    )  # fmt: skip
            except OSError as error:
                ours.close()
                seat.line = None
                seat.error = RuntimeUnavailable(
                    f"no process can be started: {one_line(error)}",
                    remedy="Check the memory and the limit of processes",
                )
                self._try_again(seat, served=None, how="not started", pid=None)
                return
        self._log.event("process started", process=seat.number, pid=seat.process.pid)
        with contextlib.suppress(OSError):  # it is dead already: ``_receive`` gets EOF
            ours.send(WorkerTask(seat.number, *descriptors[1:], self._path, self._settings))

    def _receive(self, seat: _Seat, line: Connection) -> None:
        try:
            message = line.recv()
        except (EOFError, OSError):
            self._ended(seat)
            return
        if isinstance(message, Exception):
            seat.error = message
            return
        if message == STOPPING:
            # Perhaps only this process got a signal. It refuses packets to its socket, so its successor needs another one.
            # With this copy closed, the system sends new connections to the other processes.
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
            self._announce(str(message))

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
        seat.failed_starts = seat.failed_starts + 1 if served is None else 0
        pause = _pause(seat.failures, served=served is not None)
        reason = {} if seat.error is None else {"reason": str(seat.error)}
        self._log.event("process died", process=seat.number, pid=pid, how=how, **reason, restart_in=pause)
        if not self._announced or (
            seat.failed_starts >= _STARTS and all(other.ready_at is None for other in self._seats)
        ):
            when = "before it could serve" if served is None else "while the others were started"
            raise seat.error or NotServing(
                f"process {seat.number} ended {when}: {how}", remedy="Read the log, and check the memory"
            )
        if served is None:
            self._close_listener(seat)  # clients must not wait for a process that may never start
        seat.start_at = time.monotonic() + pause

    def _reaped(self, seat: _Seat) -> int:
        """Return the return code of a process that has closed its pipe; kill it if it does not end."""
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
        """Kill processes that serve without a heartbeat; a stop has its own deadline."""
        for seat in self._seats:
            if seat.process is None or seat.ready_at is None or self._stop_seen:
                continue
            beat = self._records.heartbeat(seat.number)
            seat.silent = seat.silent + 1 if beat == seat.beat else 0
            seat.beat = beat
            if seat.silent == _SILENT:
                seat.error = NotServing(
                    f"it sent no heartbeat for {_LOOK * _SILENT:g} seconds and was killed",
                    remedy="Read its last requests in the log",
                )
                seat.process.kill()

    def _kill_late(self) -> None:
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
        for seat in self._seats:
            self._close_listener(seat)
            if seat.process is not None:
                seat.process.kill()
                self._reaped(seat)
        os.close(self._memory)


def _pause(failures: int, *, served: bool) -> float:
    """Return the seconds before the next start: 0 after one end of a process that served, doubled after each further end."""
    if served and failures <= 1:
        return 0.0
    return min(_PAUSE * 2.0 ** min(failures - 1, 10), _LONGEST_WAIT if served else _LONGEST_PAUSE)
