"""The whole of a bulk prediction: look at the sources, find what is there, predict the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnexport.bundle import Bundle
from bnexport.errors import UsageError
from bnexport.serving.bulk.job import Job, folder_of, make_job
from bnexport.serving.bulk.local import run_locally
from bnexport.serving.bulk.on_ray import run_on_ray
from bnexport.serving.bulk.request import BulkProgress, BulkRequest
from bnexport.serving.bulk.sources import Shard
from bnexport.serving.predictor import image_preprocessing

#: Engine -> what runs a job's shards. A new engine is a new row.
ENGINES: dict[str, Callable[[Job, Sequence[Shard]], Iterator[int]]] = {"local": run_locally, "ray": run_on_ray}


@dataclass(frozen=True)
class BulkResult:
    """What was done.

    Attributes:
        out: The folder of predictions.
        rows: In all files together.
        shards: Files.
        resumed_rows: Of these, rows that an earlier run had written.
        seconds: Of this run, from the first worker's start.
    """

    out: str
    rows: int
    shards: int
    resumed_rows: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def predict_in_bulk(
    bundle: Bundle | str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    engine: str = "local",
    request: BulkRequest = BulkRequest(),  # noqa: B008  (frozen)
    progress: BulkProgress | None = None,
) -> BulkResult:
    """Label every image of some folders, .npy, .npz and Parquet files, into a folder of Parquet files.

    Each row is there exactly once, also when the run was killed and started again: the same shards are cut from the same
    sources, and each is one file that appears whole.

    Args:
        bundle: A bundle or its directory. Its hashes are checked first.
        sources: Folders and files.
        out: A new folder, or one that the same job has begun.
        engine: A key of ENGINES.
        request: How.
        progress: Listener.

    Raises:
        BundleError: The bundle was changed, or is no image classifier with one input and one output.
        DataError: An image, or a source, that can't be read.
        MissingDependency: pyarrow is not here, or Ray.
        OutputError: ``out`` holds something else, another run is writing there, or it can't be written.
        UsageError: An unknown engine, or sources that overlap.
    """
    if engine not in ENGINES:
        raise UsageError(f"the engine {engine!r} is not known", remedy=f"Known: {', '.join(ENGINES)}")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.check()
    image_preprocessing(opened)
    job = make_job(opened, tuple(map(Path, sources)), Path(out), request)
    listener = progress or BulkProgress()
    with folder_of(job):
        missing = job.missing()
        resumed = job.rows - sum(shard.rows for shard in missing)
        listener.on_start(job.rows, resumed, min(request.resolved_workers(), max(len(missing), 1)))
        start = time.perf_counter()
        for rows in ENGINES[engine](job, missing) if missing else ():
            listener.on_shard(rows)
    return BulkResult(str(out), job.rows, len(job.shards), resumed, time.perf_counter() - start)
