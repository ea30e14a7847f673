"""The engine for one machine: one process per core, each with a session of one thread.

Processes and not threads: the parent outlives a crash of an engine, and decoding holds Python's lock (docs/predicting.md).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from bnexport.errors import RuntimeUnavailable
from bnexport.serving.bulk.job import Job
from bnexport.serving.bulk.sources import Shard
from bnexport.serving.bulk.worker import ShardWorker

#: Shards that wait for each worker: one is enough to keep it busy, and more would only be held in memory.
_AHEAD = 2


class _Process:
    """What a worker's process holds: a pool hands its initialiser's result to nobody."""

    job: Job | None = None
    worker: ShardWorker | None = None


def run_locally(job: Job, shards: Sequence[Shard]) -> Iterator[int]:
    """Predict shards in processes of this machine; yields the rows of each as it is written.

    Raises:
        BadInput: What a worker found; the other shards that were begun are written.
        RuntimeUnavailable: A worker's process died.
    """
    workers = min(job.request.resolved_workers(), len(shards))
    if workers <= 1:
        yield from _in_this_process(job, shards)
        return
    context = multiprocessing.get_context("spawn")  # a fork would take over locks of engines that run already
    with ProcessPoolExecutor(workers, context, _start, (job.without_shards(),)) as pool:
        try:
            yield from _in_turn(pool, shards, workers)
        except BrokenProcessPool as error:
            raise RuntimeUnavailable(
                "a process of a worker died, killed or out of memory",
                remedy="Run the same command again, with fewer --workers if memory was short: it goes on where it was",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_this_process(job: Job, shards: Sequence[Shard]) -> Iterator[int]:
    worker = ShardWorker(job)
    try:
        yield from map(worker.run, shards)
    finally:
        worker.close()


def _in_turn(pool: ProcessPoolExecutor, shards: Sequence[Shard], workers: int) -> Iterator[int]:
    left = iter(shards)
    running: set[Future[int]] = set()
    while True:
        while len(running) < workers * _AHEAD and (shard := next(left, None)) is not None:
            with _interrupts_held():
                running.add(pool.submit(_run, shard))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """No Ctrl-C inside the block, it comes after it. A process that begins inside hears none, from its first moment on."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(job: Job) -> None:
    """First thing in a worker's process that is ours; Python itself has taken a while to get here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear; a shard that was begun is finished
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _Process.job = job


def _leave_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A parent that was killed can't end its workers, and the pool's pipes do not tell them."""
    parent.join()
    os._exit(1)


def _run(shard: Shard) -> int:
    """The worker is opened here, at the first shard: what an initialiser raises reaches nobody."""
    if _Process.worker is None:
        assert _Process.job is not None
        _Process.worker = ShardWorker(_Process.job)
    return _Process.worker.run(shard)
