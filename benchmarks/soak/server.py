"""The server under a soak: ``bnexport serve`` in processes of its own, and what its log says of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.soak.processes import running
from bnexport.errors import RuntimeUnavailable
from bnexport.runtimes.isolation import import_path

#: Seconds for the server to start, and to stop.
_START, _STOP = 120.0, 60.0


class ServerUnderSoak:
    """A running ``bnexport serve``; made by ``serving``.

    Args:
        process: The supervisor.
        port: It serves on; 0 until that is known.
        log: File with its events.

    Attributes:
        pids: Number -> process id of those that are ready.
        started: All process ids that there were.
    """

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process, self.port = process, port
        self._log, self._read = log, 0
        self.pids: dict[int, int] = {}
        self.started: list[int] = []

    def new_events(self) -> list[dict[str, Any]]:
        """What its log says since the last call."""
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
        """Ask it to stop; its exit code, or None when it did not in time."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_STOP)
        except subprocess.TimeoutExpired:
            return None

    def left(self) -> list[int]:
        """Its processes that still run."""
        return [pid for pid in self.started if running(pid)]

    def end(self) -> None:
        """Kill whatever still runs of it."""
        self.process.kill()
        self.process.wait()
        self.new_events()
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(bundle: Path, processes: int, options: tuple[str, ...]) -> Iterator[ServerUnderSoak]:
    """A server of a bundle on a free port; killed at the end, whatever happens.

    Raises:
        RuntimeUnavailable: It did not start; with its last words.
    """
    command = [sys.executable, "-P", "-m", "bnexport", "serve", str(bundle), "--port", "0", "--no-access-log"]
    command += ["--processes", str(processes), *options]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": import_path()},
            )  # fmt: skip
        assert process.stdout is not None
        server = ServerUnderSoak(process, 0, log)
        try:
            ready, _, _ = select.select([process.stdout], [], [], _START)
            line = process.stdout.readline().strip() if ready else ""
            if (match := re.search(r":(\d+)$", line)) is None:
                words = log.read_text(errors="replace").strip().splitlines()[-2:]
                raise RuntimeUnavailable(
                    f"bnexport serve did not start: {' '.join(words) or 'it said nothing'}",
                    remedy="Try the same command by hand",
                )
            server.port = int(match[1])
            yield server
        finally:
            server.end()
            process.stdout.close()
