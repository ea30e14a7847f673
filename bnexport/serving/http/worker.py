"""One of the processes that serve: ``python -m bnexport.serving.http.worker``, started by ``supervisor`` alone."""

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

#: Blocked by the supervisor while it starts a process, so that none is lost before somebody listens for it.
BLOCKED = (signal.SIGTERM, signal.SIGINT)
#: What a process says when it was told to stop, by whomever.
STOPPING = "stopping"
#: Seconds over the grace until a process that should have stopped is killed.
PATIENCE = 10.0


@dataclass(frozen=True)
class WorkerTask:
    """Task of one process of several."""

    number: int  # Number of the process
    listener: int  # Descriptor of its socket, which listens already
    records: int  # Descriptor of the memory with all processes' counters
    path: Path  # A bundle, or a folder of models
    settings: ServerSettings  # Options


def main(line: Connection) -> None:
    """Serve until the supervisor sends a signal, or is gone."""
    early: list[int] = []  # what waits for a process that is to stop before it serves is answered first
    signal.signal(signal.SIGTERM, lambda number, _frame: early.append(number))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the supervisor's way to say at once
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
    try:
        job: WorkerTask = line.recv()
    except EOFError:  # the supervisor is gone already
        return

    def serving(told: str) -> None:
        _tell(line, told)
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
                announce=serving, share=share, stopping=lambda: _tell(line, STOPPING),
            )  # fmt: skip
    except (BnexportError, MemoryError) as error:
        _tell(line, error)
    except Exception as error:  # the supervisor tells it as one process would
        _tell(line, RuntimeError(f"{type(error).__name__}: {one_line(error)}"))
    else:
        leave_engines()


def _tell(line: Connection, what: str | Exception) -> None:
    with contextlib.suppress(OSError):  # the supervisor is gone, which ``_leave_with`` sees to
        line.send(what)


def _leave_with(line: Connection, grace: float) -> None:
    """Stop this process after its supervisor was killed: as if it had sent a signal, or at once after the grace."""
    try:
        line.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace + PATIENCE)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
