"""A server with all its processes: its start, its first answer, its CPU time and memory, its end (Linux's /proc)."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import last_line
from benchmarks.serving.wires import WireRequest
from bnexport.errors import RuntimeUnavailable
from bnexport.optional import one_line

#: Seconds until a server's first answer, and until its end.
_START, _END = 90.0, 3.0
_ANSWER = 10.0
#: Fields of /proc/PID/stat after the command's name (proc(5)).
_PARENT, _SESSION, _UTIME, _STIME, _RSS = 1, 3, 11, 12, 21


@dataclass(frozen=True)
class Ports:
    """Free ports for HTTP and gRPC."""

    http: int
    grpc: int


@dataclass(frozen=True)
class Running:
    """A running server."""

    process: subprocess.Popen[bytes]  # the first process of its own session, which its children are in as well
    ports: Ports
    log: Path

    def cpu_seconds(self) -> float:
        """Return user and system time of all its processes, in seconds."""
        return sum(int(row[_UTIME]) + int(row[_STIME]) for _, row in self._rows()) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Return resident memory of all its processes; shared memory counts for each."""
        return sum(resident(row) for _, row in self._rows())

    def peak_bytes(self) -> int:
        """Return the sum of the peak resident memory of its processes."""
        found = 0
        for pid, _ in self._rows():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
                    found += int(line.split()[1]) * 1024 if line.startswith("VmHWM:") else 0
        return found

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield its processes: descendants of the first one, and orphans of its session."""
        rows = {pid: row for name in os.listdir("/proc") if name.isdigit() and (row := stat_of(pid := int(name)))}
        for pid, row in rows.items():
            above = pid
            while above in rows and above != self.process.pid:
                above = int(rows[above][_PARENT])
            if above == self.process.pid or int(row[_SESSION]) == self.process.pid:
                yield pid, row

    def post(self, request: WireRequest) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers in lower case, and body."""
        return ask(self.ports.http, "POST", request.path, request.body, request.headers)

    def wait(self, answers: Callable[[], bool]) -> None:
        """Wait until ``answers`` returns True; False and an OSError mean "not yet".

        RuntimeUnavailable: the server ended, or does not answer in time.
        """
        end = time.monotonic() + _START
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if answers():
                    return
            if self.process.poll() is not None:
                raise self._silent(f"it ended with code {self.process.returncode}")
            time.sleep(0.1)
        raise self._silent(f"it does not answer after {_START:.0f} s")

    def _silent(self, what: str) -> RuntimeUnavailable:
        last = last_line(self.log.read_text(encoding="utf-8", errors="replace")).rstrip(".")
        return RuntimeUnavailable(f"{what}: {last}", remedy="Start it by hand and look")


def stat_of(pid: int) -> list[str]:
    """Return the fields of a process in /proc/PID/stat after the command's name; none if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return []


def resident(row: Sequence[str]) -> int:
    """Return the bytes of resident memory by the fields of ``stat_of``; 0 without them."""
    return int(row[_RSS]) * os.sysconf("SC_PAGE_SIZE") if row else 0


def ask(
    port: int, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send a request to a server of this machine; returns status, headers in lower case, and body."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER)) as client:
        client.request(method, path, body, dict(headers or {}))
        answer = client.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()


def counters(port: int) -> dict[str, int]:
    """Return the requests that ``bnexport serve`` answered and ran, and the nanoseconds of its engine.

    RuntimeUnavailable: it has no such counters.
    """
    try:
        _, _, body = ask(port, "GET", "/v2/models/bn_lenet/stats")
        rows = [row["inference_stats"] for row in json.loads(body)["model_stats"]]
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        problem = f"it has no counters: {one_line(error)}"
        raise RuntimeUnavailable(problem, remedy="Start it by hand and look") from error
    return {
        "success": sum(row["success"]["count"] for row in rows),
        "infer": sum(row["compute_infer"]["count"] for row in rows),
        "infer_ns": sum(row["compute_infer"]["ns"] for row in rows),
    }


@contextlib.contextmanager
def started(command: Callable[[Ports], Sequence[str]], env: Mapping[str, str]) -> Iterator[Running]:
    """Start ``command(ports)``; the server and all its processes are gone at the end.

    RuntimeUnavailable: there is no such program.
    """
    ports = free_ports()
    with tempfile.TemporaryDirectory(prefix="bnexport-benchmark-", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command(ports), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=dict(env),
                    cwd=folder, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise RuntimeUnavailable(f"it can't be started: {error}", remedy="Install it again") from error
        try:
            yield Running(process, ports, log)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END)
    with contextlib.suppress(ProcessLookupError):  # some servers never end on SIGTERM, others leave children
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_ports() -> Ports:
    """Return ports without a listener at this moment."""
    address = ("127.0.0.1", 0)
    with socket.create_server(address) as first, socket.create_server(address) as second:
        return Ports(first.getsockname()[1], second.getsockname()[1])
