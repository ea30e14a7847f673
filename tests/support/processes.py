"""A server of several processes, seen through its log."""

import contextlib
import http.client
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from support.serving import PATIENCE, Server, serving, until

TWO = ("--processes", "2")


def running(server: Server) -> dict[int, int]:
    """Number -> process id of the processes that serve."""
    found: dict[int, int] = {}
    for line in server.events():
        if line.get("event") == "process ready":
            found[line["process"]] = line["pid"]
        if line.get("event") in ("process died", "process stopped"):
            found.pop(line["process"], None)
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def killed(server: Server, number: int) -> None:
    """Kill a process and wait until another one serves in its place."""
    before = running(server)[number]
    os.kill(before, signal.SIGKILL)
    until(lambda: running(server).get(number, before) != before)


@contextlib.contextmanager
def waiting_connections(server: Server, count: int) -> Iterator[list[http.client.HTTPConnection]]:
    """Yield connections with one request each, whose answers are not read yet."""
    with contextlib.ExitStack() as stack:
        connections = []
        for index in range(count):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
            stack.callback(connection.close)
            connection.request("GET", "/v2", headers={"x-request-id": f"waiting-{index}"})
            connections.append(connection)
        yield connections


def counted(server: Server, pattern: str) -> float:
    """Sum of the samples of the metrics whose names and labels match."""
    lines = server.metrics().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(pattern, line))


@contextlib.contextmanager
def serving_twice(models: Path, log: Path, *options: str) -> Iterator[Server]:
    """Start a server of two processes, and yield it when both are ready."""
    with serving(models, log, *TWO, *options) as server:
        until(lambda: sorted(running(server)) == [0, 1])
        yield server
