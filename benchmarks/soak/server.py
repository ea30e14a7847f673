"""The server under a soak: ``bnexport serve`` in several processes, their log, memory and connections (Linux's proc(5))."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving.process import Running, ask, started, stat_of
from bnexport.runtimes.isolation import import_path

#: Seconds for the server to stop.
_STOP = 60.0
#: States in /proc/PID/stat: Z and X have ended, T is stopped.
_ENDED, _STOPPED = "ZX", "T"
_STEP = 0.002
#: Reads of the table of connections: one read can miss a connection while others come and go.
_LOOKS = 3


class ServerUnderSoak:
    """A running ``bnexport serve``; made by ``serving``."""

    def __init__(self, server: Running) -> None:
        self.process, self.port = server.process, server.ports.http  # of the supervisor
        self._log, self._read = server.log, 0
        self.pids: dict[int, int] = {}  # number -> process id of the ready processes
        self.started: list[int] = []  # all process ids so far

    def new_events(self) -> list[dict[str, Any]]:
        """Return the events of its log since the last call."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        events: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        for event in events:
            what = event.get("event")
            if what == "process started":
                self.started.append(event["pid"])
            elif what == "process ready":
                self.pids[event["process"]] = event["pid"]
            elif what == "process died" and self.pids.get(event["process"]) == event["pid"]:
                del self.pids[event["process"]]
        return events

    def stop(self) -> int | None:
        """Send SIGTERM; returns the exit code, or None after the time limit."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_STOP)
        except subprocess.TimeoutExpired:
            return None

    def left(self) -> list[int]:
        """Return its running processes."""
        return [pid for pid in self.started if running(pid)]


@contextlib.contextmanager
def serving(bundle: Path, processes: int, options: tuple[str, ...]) -> Iterator[ServerUnderSoak]:
    """Serve a bundle, and kill the server at the end; RuntimeUnavailable if it does not start."""
    words = [sys.executable, "-P", "-m", "bnexport", "serve", str(bundle.resolve()), "--no-access-log"]
    words += ["--processes", str(processes), *options, "--port"]
    environment = {**os.environ, "PYTHONPATH": import_path()}
    with started(lambda ports: [*words, str(ports.http)], environment) as server:
        server.wait(lambda: ask(server.ports.http, "GET", "/v2/health/live")[0] == 200)
        yield ServerUnderSoak(server)


def state(pid: int) -> str:
    """Return the letter of a process's state; "X" if it is gone."""
    return (stat_of(pid) or ["X"])[0]


def running(pid: int) -> bool:
    """Return True until the last thread of a process has ended; every thread holds its connections."""
    try:
        threads = [task.name for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return False
    return len(threads) > 1 or state(pid) not in _ENDED


def accepted(pid: int, port: int) -> frozenset[int]:
    """Return the clients' ports of a process's open accepted connections to ``port`` (IPv4)."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    # The remote port and the inode of each row with this local port; most rows are of closed connections.
    rows = re.compile(rf"^ *\d+: \w+:{port:04X} \w+:(\w+) (?:\S+ +){{6}}(\d+)", re.MULTILINE)
    tables = (Path("/proc/net/tcp").read_text() for _ in range(_LOOKS))
    found = {(int(remote, 16), inode) for table in tables for remote, inode in rows.findall(table)}
    return frozenset(remote for remote, inode in found if remote and inode in inodes)


def kill_and_see(pid: int, port: int, patience: float = 10.0) -> frozenset[int]:
    """Kill a process by SIGKILL, and return the clients' ports of its accepted connections at that moment.

    It is stopped some milliseconds before, so that the connections can't change between the read and the kill. The function
    returns after the process has ended and the system has closed its connections. OSError: the process is gone already.
    """
    end = time.monotonic() + patience
    os.kill(pid, signal.SIGSTOP)
    try:
        while state(pid) != _STOPPED and time.monotonic() < end:
            time.sleep(_STEP)
        ports = accepted(pid, port)
    finally:  # after an interrupt, too: a stopped process would stay for ever
        os.kill(pid, signal.SIGKILL)
    while running(pid) and time.monotonic() < end:
        time.sleep(_STEP)
    return ports
