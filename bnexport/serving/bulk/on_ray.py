"""The engine for many machines: the same worker as actors of Ray Data. Needs Ray (extra ``ray``).

Every machine must see the bundle, the sources and the folder of predictions under the same path: a shared file system.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from bnexport.errors import BnexportError, RuntimeUnavailable
from bnexport.optional import one_line, require
from bnexport.serving.bulk.job import Job
from bnexport.serving.bulk.sources import Shard
from bnexport.serving.bulk.worker import ShardWorker

#: Seconds for Ray Data's threads to end. One that only sleeps, and so does no harm, may never end (Ray 2.60).
_PATIENCE = 2.0


class ShardActor:
    """A worker as Ray Data calls it: one row in, one row out. What travels is pickled here: Arrow has no type for it.

    Args:
        job: Pickled, without its shards.
        folder: Where the user is, which relative paths start from; Ray's processes are where Ray was started.
    """

    def __init__(self, job: bytes, folder: str) -> None:
        with contextlib.suppress(OSError):  # a machine without this folder can still have all that is named in full
            os.chdir(folder)
        self._job = job
        self._worker: ShardWorker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Predict and write the shard of a row. An error of ours travels as a value: Ray would try it again."""
        try:
            if self._worker is None:  # what a constructor raises reaches nobody as it is
                self._worker = ShardWorker(pickle.loads(self._job))  # noqa: S301  (written by run_on_ray)
            return {"rows": self._worker.run(pickle.loads(row["shard"])), "error": b""}  # noqa: S301
        except BnexportError as error:
            return {"rows": 0, "error": pickle.dumps(error)}


@contextlib.contextmanager
def threads_ended() -> Iterator[None]:
    """Wait for threads that began in the block: one that asks a Ray which is shut down ends the process without a word."""
    before = set(threading.enumerate())
    try:
        yield
    finally:
        end = time.monotonic() + _PATIENCE
        for thread in set(threading.enumerate()) - before:
            thread.join(max(end - time.monotonic(), 0.0))


def run_on_ray(job: Job, shards: Sequence[Shard]) -> Iterator[int]:
    """Predict shards in actors of a Ray cluster, or of one that is started here; yields the rows of each.

    An actor that dies is replaced, and its shard is written again: as a whole, so that no row is there twice.

    Raises:
        BadInput: What a worker found.
        MissingDependency: Ray is not here.
        RuntimeUnavailable: Ray gave up.
    """
    ray, data = require("ray", purpose="--engine ray"), require("ray.data", purpose="--engine ray")
    bare = pickle.dumps(job.without_shards())
    workers = min(job.request.resolved_workers(), len(shards))
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ part writes to the terminal
        # A cluster is joined whose address is in the environment, or that runs on this machine; else Ray starts here.
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        except OSError as error:  # ConnectionError is one
            raise RuntimeUnavailable(
                f"Ray can't be reached or started: {one_line(error)}",
                remedy="Check RAY_ADDRESS and what the cluster asks for, or leave RAY_ADDRESS out to start Ray here",
            ) from error
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # progress is told by our own listener
    try:
        data.DataContext.get_current().enable_progress_bars = False
        rows = data.from_items([{"shard": pickle.dumps(shard)} for shard in shards], override_num_blocks=len(shards))
        pool = data.ActorPoolStrategy(size=workers)
        done = rows.map(ShardActor, fn_constructor_args=(bare, os.getcwd()), compute=pool, num_cpus=1)
        with threads_ended(), contextlib.closing(iter(done.iter_rows())) as found:
            for row in found:
                if row["error"]:
                    raise pickle.loads(row["error"])  # noqa: S301
                yield int(row["rows"])
    except ray.exceptions.RayError as error:
        raise RuntimeUnavailable(
            f"Ray gave up: {one_line(error)}", remedy="Run the same command again: it goes on where it was"
        ) from error
    finally:
        logger.setLevel(level)
        if started:
            ray.shutdown()
