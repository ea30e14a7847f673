"""What Linux tells of other processes (proc(5)): their memory, their state, and their connections."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

#: Field of /proc/PID/stat after the name: the state. Z and X have ended, T is stopped.
_ENDED, _STOPPED = "ZX", "T"
_STEP = 0.002
#: The table of connections is read in pieces, and misses one now and then while others come and go.
_LOOKS = 3


def resident(pid: int) -> int:
    """Bytes of a process's resident memory; 0 when it has ended."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def state(pid: int) -> str:
    """The letter of a process's state; "X" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def running(pid: int) -> bool:
    """Whether a process has not ended.

    Its first thread may have ended before the others, which hold the connections as well.
    """
    try:
        threads = [task.name for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return False
    return len(threads) > 1 or state(pid) not in _ENDED


def accepted(pid: int, port: int) -> frozenset[int]:
    """The clients' ports of the connections to ``port`` that a process has accepted and not closed (IPv4)."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    # The other end's port and the inode of each row whose own port it is; much of the table is of connections that are closed.
    rows = re.compile(rf"^ *\d+: \w+:{port:04X} \w+:(\w+) (?:\S+ +){{6}}(\d+)", re.MULTILINE)
    tables = (Path("/proc/net/tcp").read_text() for _ in range(_LOOKS))
    found = {(int(remote, 16), inode) for table in tables for remote, inode in rows.findall(table)}
    return frozenset(remote for remote, inode in found if remote and inode in inodes)


def kill_and_see(pid: int, port: int, patience: float = 10.0) -> frozenset[int]:
    """Kill a process by SIGKILL; returns the clients' ports of the connections that it had accepted at that moment.

    It is stopped for some milliseconds before, so that none comes between the look and the kill. Returns when it has ended,
    which is after the system has closed its connections.

    Raises:
        OSError: It is not there any more.
    """
    end = time.monotonic() + patience
    os.kill(pid, signal.SIGSTOP)
    try:
        while state(pid) != _STOPPED and time.monotonic() < end:
            time.sleep(_STEP)
        ports = accepted(pid, port)
    finally:  # also when it was interrupted: one that stands still would do so for ever
        os.kill(pid, signal.SIGKILL)
    while running(pid) and time.monotonic() < end:
        time.sleep(_STEP)
    return ports
