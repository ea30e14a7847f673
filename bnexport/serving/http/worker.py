"""One of several serving processes: ``python -m bnexport.serving.http.worker``, started by ``supervisor`` only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from bnexport.errors import BnexportError
from bnexport.optional import one_line
from bnexport.serving.counters import Records, Share
from bnexport.serving.http.http_server import ServerSettings, leave_engines, serve_on

#: Signals that the supervisor blocks while it starts a process, so that none is lost before the process handles it.
BLOCKED = (signal.SIGTERM, signal.SIGINT)
#: Message of a process that received a signal to stop.
STOPPING = "stopping"
#: Seconds after the grace until a process that did not stop is killed.
PATIENCE = 10.0


@dataclass(frozen=True)
class WorkerTask:
    """Task of one process of several."""

    number: int  # Number of the process
    listener: int  # Descriptor of its socket, which listens already
    records: int  # Descriptor of the memory with the counters of all processes
    path: Path  # A bundle, or a folder of models
    settings: ServerSettings  # Options


def main(line: Connection) -> None:
    """Serve until the supervisor sends a signal or dies."""
    early: list[int] = []  # a process that must stop before it serves first answers the waiting clients
    signal.signal(signal.SIGTERM, lambda number, _frame: early.append(number))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the supervisor sends it to stop at once
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
    try:
        job: WorkerTask = line.recv()
    except EOFError:  # the supervisor is dead
        return

    def serving(sentence: str) -> None:
        _send(line, sentence)
        if early:
            signal.raise_signal(signal.SIGTERM)

    threading.Thread(
        target=_leave_with, args=(line, job.settings.grace), name="bnexport-supervisor", daemon=True
    ).start()
    try:
        share = Share(Records(job.records), job.number, job.settings.models.processes)
        with socket.socket(fileno=job.listener) as listener:
            serve_on(
                listener, job.path, job.settings,
                announce=serving, share=share, stopping=lambda: _send(line, STOPPING),
            )  # fmt: skip
    except (BnexportError, MemoryError) as error:
        _send(line, error)
    except Exception as error:  # the supervisor reports it as a single process would
        _send(line, RuntimeError(f"{type(error).__name__}: {one_line(error)}"))
    else:
        leave_engines()


def _send(line: Connection, message: str | Exception) -> None:
    with contextlib.suppress(OSError):  # the supervisor is dead: ``_leave_with`` stops this process
        line.send(message)


def _leave_with(line: Connection, grace: float) -> None:
    """Stop this process after the death of its supervisor: by SIGTERM, and by SIGKILL after the grace."""
    try:
        line.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace + PATIENCE)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
