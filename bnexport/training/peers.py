"""Notices a lost process where NCCL does not.

NCCL's kernels wait for a lost process until the time-out, and then its watchdog aborts this process (SIGABRT). Gloo's
connections are closed at once when a process ends. So next to NCCL the processes form a ring of gloo connections: each one
listens to the next, in a thread, and sends a word to the one before when it leaves.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist

from bnexport import interrupts
from bnexport.errors import RuntimeUnavailable
from bnexport.optional import one_line

_DONE, _FAILED = 0, 1
#: Seconds in which a process ends by itself after the next one has left with an error, because the error is its own too.
_GRACE = 10.0
_FOREVER = datetime.timedelta(days=365)
#: Exit code of a training whose processes were lost, as of every ``Unavailable``.
_UNAVAILABLE = 3


def lost(reason: str) -> RuntimeUnavailable:
    """Return the error of a training that has lost a process."""
    return RuntimeUnavailable(
        f"another process of this training is gone: {reason}",
        remedy="The last whole epoch is kept: start again with --resume, with any number of processes",
    )


@contextlib.contextmanager
def watched(rank: int, size: int) -> Iterator[None]:
    """End this process with exit code 3 when another process is lost inside of the block.

    The main thread may be in a kernel that never ends, so the process ends without it. Files are whole or absent at any
    moment.

    Args:
        rank: This process's number.
        size: Number of processes; all of them enter the block together.
    """
    group: Any = dist.new_group(backend="gloo", timeout=_FOREVER)
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=((rank + 1) % size, group, over), daemon=True)
    listener.start()
    word = _FAILED
    try:
        yield
        word = _DONE
    finally:
        over.set()
        with contextlib.suppress(RuntimeError):  # the process before is gone already
            dist.send(torch.tensor([word]), dst=(rank - 1) % size, group=group)
        listener.join(None if word == _DONE else 1.0)


def _listen(peer: int, group: Any, over: threading.Event) -> None:
    word = torch.tensor([_FAILED])
    try:
        dist.recv(word, src=peer, group=group)
        if word.item() == _DONE or over.wait(_GRACE):
            return
        reason = f"process {peer} left with an error"
    except RuntimeError as error:
        if over.is_set():
            return
        reason = one_line(error)
    found = lost(reason)
    print(f"Error: {found.message}.\n{found.remedy}.", file=sys.stderr)
    interrupts.exit_at_once(_UNAVAILABLE)
