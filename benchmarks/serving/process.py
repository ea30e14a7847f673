"""A server with all its processes: started, asked until it answers, its CPU time and memory read, ended (Linux's /proc)."""

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

from benchmarks.serving.wires import Request
from bnexport.errors import RuntimeUnavailable
from bnexport.optional import one_line

#: Seconds that a server has to answer for the first time, and to end.
_START, _END = 90.0, 3.0
_ANSWER = 10.0
#: Fields of /proc/PID/stat behind the command's name (proc(5)).
_PARENT, _SESSION, _UTIME, _STIME, _RSS = 1, 3, 11, 12, 21


@dataclass(frozen=True)
class Ports:
    """Free ports: ``http`` with two more behind it, and ``grpc``."""

    http: int
    grpc: int


@dataclass(frozen=True)
class Running:
    """A server that runs.

    Attributes:
        process: The first process of a session of its own, in which its children are as well.
        ports: Where it listens.
        log: What it wrote.
    """

    process: subprocess.Popen[bytes]
    ports: Ports
    log: Path

    def cpu_seconds(self) -> float:
        """User and system time of all its processes, in seconds."""
        return sum(int(row[_UTIME]) + int(row[_STIME]) for _, row in self._rows()) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Resident memory of all its processes; what they share counts for each."""
        return sum(int(row[_RSS]) for _, row in self._rows()) * os.sysconf("SC_PAGE_SIZE")

    def peak_bytes(self) -> int:
        """Sum of the most resident memory that each of its processes ever had."""
        found = 0
        for pid, _ in self._rows():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
                    found += int(line.split()[1]) * 1024 if line.startswith("VmHWM:") else 0
        return found

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Its processes: those that descend from the first one, and orphans of its session."""
        rows: dict[int, list[str]] = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    text = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace")
                    rows[int(entry.name)] = text.rpartition(")")[2].split()
        for pid, row in rows.items():
            above = pid
            while above in rows and above != self.process.pid:
                above = int(rows[above][_PARENT])
            if above == self.process.pid or int(row[_SESSION]) == self.process.pid:
                yield pid, row

    def post(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, body."""
        return ask(self.ports.http, "POST", request.path, request.body, request.headers)

    def wait(self, answers: Callable[[], bool]) -> None:
        """Wait until the server answers.

        Args:
            answers: Asks; False or an OSError for "not yet".

        Raises:
            RuntimeUnavailable: It ended, or does not answer in time.
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
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = (lines or ["no output"])[-1][:200].rstrip(".")
        return RuntimeUnavailable(f"{what}: {last}", remedy="Start it by hand and look")


def ask(
    port: int, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Ask a server of this machine once.

    Returns:
        Status, headers in lower case, body.

    Raises:
        OSError: Nobody listens, or no answer comes.
    """
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER)) as client:
        client.request(method, path, body, dict(headers or {}))
        answer = client.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()


def counters(port: int) -> dict[str, int]:
    """How many requests ``bnexport serve`` has answered and run, and for how many nanoseconds its engine ran.

    Raises:
        RuntimeUnavailable: It does not say.
    """
    try:
        _, _, body = ask(port, "GET", "/v2/models/bn_lenet/stats")
        rows = [row["inference_stats"] for row in json.loads(body)["model_stats"]]
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise RuntimeUnavailable(
            f"it has no counters: {one_line(error)}", remedy="Start it by hand and look"
        ) from error
    return {
        "success": sum(row["success"]["count"] for row in rows),
        "infer": sum(row["compute_infer"]["count"] for row in rows),
        "infer_ns": sum(row["compute_infer"]["ns"] for row in rows),
    }


@contextlib.contextmanager
def started(command: Callable[[Ports], Sequence[str]], env: Mapping[str, str]) -> Iterator[Running]:
    """Start a server; it and all its processes are gone at the end.

    Args:
        command: What to run, when told the ports.
        env: Its environment.

    Raises:
        RuntimeUnavailable: There is no such program.
    """
    ports = free_ports()
    with tempfile.TemporaryDirectory(prefix="bnexport-benchmark-", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command(ports),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=dict(env),
                    cwd=folder,
                    start_new_session=True,
                )
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
    with contextlib.suppress(ProcessLookupError):  # some servers never end by themselves, others leave children
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_ports() -> Ports:
    """Ports that nobody listens on; a moment later somebody may."""
    for _ in range(100):
        with contextlib.ExitStack() as held:
            try:
                first = held.enter_context(_listener(0)).getsockname()[1]
                for port in (first + 1, first + 2):
                    held.enter_context(_listener(port))
                return Ports(first, held.enter_context(_listener(0)).getsockname()[1])
            except (OSError, OverflowError):
                continue
    raise RuntimeUnavailable("there are no free ports", remedy="End some servers")


def _listener(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))
