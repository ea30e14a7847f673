"""The engine for many machines: the same worker as actors of Ray Data. Needs Ray (extra ``ray``).

Every machine must see the bundle, the sources and the folder of predictions under the same path: a shared file system.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from bnexport.errors import BnexportError, RuntimeUnavailable
from bnexport.optional import one_line, require
from bnexport.serving.bulk.job import Job
from bnexport.serving.bulk.sources import Shard
from bnexport.serving.bulk.worker import ShardWorker


class ShardActor:
    """A worker as Ray Data calls it: one row in, one row out. What travels is pickled here: Arrow has no type for it.

    Args:
        job: Pickled, without its shards.
    """

    def __init__(self, job: bytes) -> None:
        self._worker = ShardWorker.of(pickle.loads(job))  # noqa: S301  (written by run_on_ray)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Predict and write the shard of a row. An error of ours travels as a value: Ray would try it again."""
        try:
            return {"rows": self._worker.run(pickle.loads(row["shard"])), "error": b""}  # noqa: S301
        except BnexportError as error:
            return {"rows": 0, "error": pickle.dumps(error)}


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
        # A cluster whose address is in the environment is joined; without one Ray starts here.
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # progress is told by our own listener
    try:
        data.DataContext.get_current().enable_progress_bars = False
        rows = data.from_items([{"shard": pickle.dumps(shard)} for shard in shards], override_num_blocks=len(shards))
        pool = data.ActorPoolStrategy(size=workers)
        for row in rows.map(ShardActor, fn_constructor_args=(bare,), compute=pool, num_cpus=1).iter_rows():
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
