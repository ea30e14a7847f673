"""Bulk prediction: plans a job, and predicts its missing shards in processes of this machine or with Ray.

::

    OUT/_job.json             the job: bundle, sources, columns
    OUT/part-00000.parquet    one file per shard, complete or absent

Readers of Parquet folders ignore names that start with _ or a dot. Files of another job are refused.

Workers are processes instead of threads: the parent survives a crash of an engine, and decoding holds Python's lock
(docs/predicting.md). With Ray (extra ``ray``), the bundle, the sources and the predictions must have the same paths on every
machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bnexport import interrupts
from bnexport.bundle import MANIFEST, Bundle
from bnexport.errors import BnexportError, DataError, OutputError, RuntimeUnavailable, UsageError
from bnexport.files import held, output_errors, refuse_overlap, sha256, write_atomically
from bnexport.optional import one_line, require
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import runner_spec
from bnexport.serving.bulk.bulk_request import BulkProgress, BulkRequest
from bnexport.serving.bulk.image_sources import SOURCES, NpzFiles, Shard, plan
from bnexport.serving.bulk.parquet import encode, rows_in
from bnexport.serving.predictor import check_labels, image_preprocessing, run_images
from bnexport.tensors import Array
from bnexport.tuned import Choice, tuned_choice, tuning_line

JOB = "_job.json"
FORMAT = "bnexport-predictions"
FORMAT_VERSION = 2
#: Keys of the description that concern all shards together.
_OF_ALL = ("sources", "fingerprint", "rows", "shards")


@dataclass(frozen=True)
class BulkJob:
    """A bulk prediction."""

    bundle: str  # Directory of the bundle
    out: str  # The folder of predictions
    request: BulkRequest  # Options
    shards: tuple[Shard, ...]  # All shards, in order
    description: dict[str, Any]  # Content of _job.json

    @property
    def rows(self) -> int:
        """Number of rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    def about(self, shard: Shard) -> str:
        """Return the metadata of a shard's file: everything that determines its rows."""
        common = {key: value for key, value in self.description.items() if key not in _OF_ALL}
        mine = {"source": shard.path, "start": shard.start, "rows": shard.rows, "stat": shard.stat}
        return json.dumps(common | mine, sort_keys=True)

    def without_shards(self) -> BulkJob:
        """Return a copy for workers, which receive shards one by one."""
        return replace(self, shards=())

    def write(self, shard: Shard, content: bytes) -> int:
        """Write the file of a shard; return its rows."""
        write_atomically(part_file(Path(self.out), shard), content)
        return shard.rows

    def missing(self) -> list[Shard]:
        """Return the shards whose file is missing, incomplete, or of another job or a changed source."""
        out = Path(self.out)
        return [shard for shard in self.shards if rows_in(part_file(out, shard), about=self.about(shard)) != shard.rows]


def part_file(out: Path, shard: Shard) -> Path:
    """Return the path of a shard's file."""
    return out / f"part-{shard.number:05d}.parquet"


def make_job(bundle: Bundle, sources: tuple[Path, ...], out: Path, request: BulkRequest) -> BulkJob:
    """Plan a job from its sources without writing anything."""
    refuse_overlap(out, bundle.path)
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise UsageError(f"{out} is inside the source {source}", remedy="Choose a folder outside of it")
    planned = plan(sources, request)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": bundle.manifest.name,
        "version": bundle.manifest.version,
        "manifest": sha256(bundle.path / MANIFEST),
        "sources": [str(path) for path in sources],
        "fingerprint": planned.fingerprint,
        "rows": sum(shard.rows for shard in planned.shards),
        "shards": len(planned.shards),
        "shard_rows": request.shard_rows,
        "column": request.column,
        "id_column": request.id_column,
        "logits": request.logits,
        "runtime": request.runtime,
    }
    return BulkJob(str(bundle.path), str(out), request, tuple(planned.shards), description)


@contextlib.contextmanager
def folder_of(job: BulkJob) -> Iterator[None]:
    """Lock the folder of predictions, and open it for a job."""
    out = Path(job.out)
    if out.exists() and not out.is_dir():
        raise _no_folder(out)
    with held(out):
        _begin(job, out)
        yield


def _no_folder(out: Path) -> OutputError:
    return OutputError(
        f"{out} is not a folder of predictions", remedy="Choose another folder; --force does not replace this one"
    )


def _begin(job: BulkJob, out: Path) -> None:
    """Begin a job in its locked folder, or resume it."""
    before = _description(out)
    if before == job.description:
        _remove(out.glob(".part-*.part"))  # unfinished files of a killed process
        return
    if before is None and any(out.iterdir()):
        raise _no_folder(out)
    if before is not None:
        if not job.request.force:
            raise OutputError(
                f"{out} contains the predictions of another job: {_difference(before, job.description)}",
                remedy="Choose another folder, or delete the other job's files with --force",
            )
        kept = {part_file(out, shard) for shard in job.shards} - {part_file(out, shard) for shard in job.missing()}
        _remove([*({*out.glob("part-*.parquet")} - kept), *out.glob(".part-*.part")])
    write_atomically(out / JOB, (json.dumps(job.description, indent=1) + "\n").encode())


def _description(out: Path) -> dict[str, Any] | None:
    """Return the content of the folder's _job.json; None without the file."""
    file = out / JOB
    try:
        value = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{file} can't be read: {one_line(error)}", remedy="Choose another folder") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise OutputError(f"{file} was not written by bnexport", remedy="Choose another folder")
    return value


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    key = next(key for key in (*now, *before) if before.get(key) != now.get(key))
    if key == "fingerprint":
        return "a source has changed"
    return f"{key} was {before.get(key)!r}, now {now.get(key)!r}"


def _remove(files: Iterator[Path] | list[Path]) -> None:
    for file in files:
        with output_errors(file):
            file.unlink(missing_ok=True)


class ShardWorker:
    """Predicts and writes shards of a job with one session. The caller must check the bundle's hashes."""

    def __init__(self, job: BulkJob) -> None:
        opened = Bundle.open(job.bundle)
        self._job, self._request = job, job.request
        self._files = NpzFiles()
        self._preprocessing = image_preprocessing(opened)
        self._labels = opened.manifest.labels or ()
        self._runner = runner_spec(job.request.runtime).open(
            opened, settings=RunSettings(threads=job.request.resolved_threads())
        )

    def close(self) -> None:
        """Free the session and close open sources."""
        self._files.close()
        self._runner.close()

    def run(self, shard: Shard) -> int:
        """Predict and write one shard; return its rows."""
        return self._job.write(shard, self.predict(shard))

    def predict(self, shard: Shard) -> bytes:
        """Return the content of a shard's file."""
        ids: list[str] = []
        parts: list[Array] = []
        for names, images in SOURCES[shard.kind].read(shard, self._request, self._preprocessing, self._files):
            logits = self._logits(images)
            if not np.isfinite(logits).all():
                row = int(np.flatnonzero(~np.isfinite(logits).all(1))[0])
                raise DataError(
                    f"the model's answer to {names[row]} contains NaN or infinity",
                    remedy="Run bnexport verify on the bundle",
                )
            ids += names
            parts.append(logits)
        if len(ids) != shard.rows:
            raise DataError(
                f"{shard.path} has {len(ids)} rows, but had {shard.rows} when they were counted",
                remedy="Do not change the source while it is read, and start again",
            )
        shard.check_unchanged()
        logits = np.concatenate(parts)
        labels = [*self._labels, *map(str, range(len(self._labels), logits.shape[1]))]
        return encode(ids, logits, labels=labels, keep_logits=self._request.logits, about=self._job.about(shard))

    def _logits(self, images: Array) -> Array:
        """Return the logits of images, tile by tile: the tensors of a small tile stay in the processor's cache."""
        size = self._request.resolved_batch()
        tiles = (images[start : start + size] for start in range(0, len(images), size))
        return np.concatenate([run_images(self._runner, self._preprocessing.apply(tile)) for tile in tiles])


#: Unfinished shards per worker: one that is predicted, and one that waits or is being written. It limits the memory.
_AHEAD = 2


class _Process:
    """State of a worker's process: a pool drops the result of its initialiser."""

    job: BulkJob | None = None
    worker: ShardWorker | None = None


def run_locally(job: BulkJob, shards: Sequence[Shard]) -> Iterator[int]:
    """Predict shards in processes of this machine; yield the rows of each as it is written.

    Threads of this process write while the sessions predict the next shards.
    """
    workers = min(job.request.resolved_workers(), len(shards))
    if workers == 1:
        yield from _alone(job, shards)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of running engines
    with (
        ThreadPoolExecutor(workers * _AHEAD) as writers,
        ProcessPoolExecutor(workers, context, _start, (job.without_shards(),)) as pool,
    ):

        def start(shard: Shard) -> Future[int]:
            with interrupts.blocked(signal.SIGINT):  # also in the processes that it starts
                predicted = pool.submit(_run, shard)
            return writers.submit(lambda: job.write(shard, predicted.result()))

        try:
            yield from _in_turn(start, shards, workers * _AHEAD)
        except BrokenProcessPool as error:
            raise RuntimeUnavailable(
                "a worker's process died: it was killed or out of memory",
                remedy="Run the same command again to resume, with fewer --workers if memory was short",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _alone(job: BulkJob, shards: Sequence[Shard]) -> Iterator[int]:
    """Predict in this process, and write each shard during the prediction of the next one."""
    with contextlib.closing(ShardWorker(job)) as worker, ThreadPoolExecutor(1) as writer:
        yield from _in_turn(lambda shard: writer.submit(job.write, shard, worker.predict(shard)), shards, _AHEAD)


def _in_turn(start: Callable[[Shard], Future[int]], shards: Sequence[Shard], most: int) -> Iterator[int]:
    """Start shards, at most ``most`` at once, and yield the rows of each as it ends."""
    left = iter(shards)
    running: set[Future[int]] = set()
    while True:
        while len(running) < most and (shard := next(left, None)) is not None:
            running.add(start(shard))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _start(job: BulkJob) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; the worker finishes its shard
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _Process.job = job


def _leave_with(parent: multiprocessing.process.BaseProcess) -> None:
    """End a worker whose parent was killed; the pool's pipes do not report that."""
    parent.join()
    os._exit(1)


def _run(shard: Shard) -> bytes:
    """Predict a shard. The first one opens the worker, because the pool drops exceptions of its initialiser."""
    if _Process.worker is None:
        assert _Process.job is not None
        _Process.worker = ShardWorker(_Process.job)
    return _Process.worker.predict(shard)


#: Seconds for Ray Data's threads to end. A thread that only sleeps may never end, which is harmless (Ray 2.60).
_RAY_PATIENCE = 2.0


class ShardActor:
    """A worker in Ray Data's form: it maps one row to one row. Values are pickled, because Arrow has no type for them.

    ``job`` is pickled without its shards. ``folder`` is the user's working directory; Ray's processes start in another one.
    """

    def __init__(self, job: bytes, folder: str) -> None:
        with contextlib.suppress(OSError):  # a machine without this folder can still use absolute paths
            os.chdir(folder)
        self._job = job
        self._worker: ShardWorker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Predict and write the shard of a row. Return a bnexport error as a value: Ray would retry an exception."""
        try:
            if self._worker is None:  # Ray would wrap an exception of the constructor
                self._worker = ShardWorker(pickle.loads(self._job))  # noqa: S301  (written by run_on_ray)
            return {"rows": self._worker.run(pickle.loads(row["shard"])), "error": b""}  # noqa: S301
        except BnexportError as error:
            return {"rows": 0, "error": pickle.dumps(error)}


@contextlib.contextmanager
def threads_ended() -> Iterator[None]:
    """Wait for threads that started in the block: a thread that calls Ray after its shutdown ends the process silently."""
    before = set(threading.enumerate())
    try:
        yield
    finally:
        end = time.monotonic() + _RAY_PATIENCE
        for thread in set(threading.enumerate()) - before:
            thread.join(max(end - time.monotonic(), 0.0))


def run_on_ray(job: BulkJob, shards: Sequence[Shard]) -> Iterator[int]:
    """Predict shards in actors of a Ray cluster, or of a Ray that is started here; yield the rows of each.

    Ray replaces a dead actor, and its whole shard is written again, so that no row is duplicated.
    """
    ray, data = require("ray", purpose="--engine ray"), require("ray.data", purpose="--engine ray")
    bare = pickle.dumps(job.without_shards())
    workers = min(job.request.resolved_workers(), len(shards))
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ part writes to the terminal
        # ray.init joins the cluster of RAY_ADDRESS, or one on this machine; otherwise it starts Ray here.
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        except OSError as error:  # ConnectionError is one
            raise RuntimeUnavailable(
                f"Ray can't be reached or started: {one_line(error)}",
                remedy="Check RAY_ADDRESS and the cluster's requirements, or unset RAY_ADDRESS to start Ray here",
            ) from error
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the listener reports progress
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
            f"Ray failed: {one_line(error)}", remedy="Run the same command again to resume"
        ) from error
    finally:
        logger.setLevel(level)
        if started:
            ray.shutdown()


#: Engine -> function that runs a job's shards. A new engine is a new row.
ENGINES: dict[str, Callable[[BulkJob, Sequence[Shard]], Iterator[int]]] = {"local": run_locally, "ray": run_on_ray}


@dataclass(frozen=True)
class BulkResult:
    """Result of a bulk prediction."""

    out: str  # The folder of predictions
    rows: int  # Rows of all files
    shards: int  # Number of files
    resumed_rows: int  # Rows that an earlier run had written
    seconds: float  # Duration of this run from the start of the first worker

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def _tuned(bundle: Bundle, request: BulkRequest, listener: BulkProgress) -> BulkRequest:
    """Return the request with the tuning of its bundle, if one applies here."""
    found = tuned_choice(bundle, "throughput", request.runtime)
    if not isinstance(found, Choice):
        if found is not None:
            listener.on_tuning(tuning_line(found))
        return request
    tuned = replace(request, tuning=found)
    threads, sessions = tuned.resolved_threads(), tuned.resolved_workers()
    listener.on_tuning(tuning_line(replace(found, sessions=sessions, threads=threads, batch=tuned.resolved_batch())))
    return tuned


def predict_in_bulk(
    bundle: Bundle | str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    engine: str = "local",
    request: BulkRequest = BulkRequest(),  # noqa: B008  (frozen)
    progress: BulkProgress | None = None,
) -> BulkResult:
    """Label every image of folders, .npy, .npz and Parquet files, into a folder of Parquet files.

    Each row is written exactly once, even if the run was killed and started again: the same sources always give the same
    shards, and each shard is one file that is complete or absent.

    Args:
        bundle: A bundle or its directory. Its hashes are checked first.
        sources: Folders and files.
        out: A new folder, or the folder of the same job.
        engine: A key of ENGINES.
        request: Options.
        progress: Listener.

    Raises:
        BundleError: The bundle was changed, or is not an image classifier with one input and one output.
        DataError: An image or a source can't be read.
        MissingDependency: pyarrow or Ray is missing.
        OutputError: ``out`` has other contents, another run is writing there, or it can't be written.
        UsageError: The engine is unknown, or sources overlap.
    """
    if engine not in ENGINES:
        raise UsageError(f"the engine {engine!r} is unknown", remedy=f"The engines are {', '.join(ENGINES)}")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.check()
    image_preprocessing(opened)
    check_labels(opened)
    listener = progress or BulkProgress()
    request = _tuned(opened, request, listener) if engine == "local" else request  # machines of a cluster may differ
    job = make_job(opened, tuple(map(Path, sources)), Path(out), request)
    with folder_of(job):
        missing = job.missing()
        resumed = job.rows - sum(shard.rows for shard in missing)
        listener.on_start(job.rows, resumed, min(request.resolved_workers(), max(len(missing), 1)))
        start = time.perf_counter()
        for rows in ENGINES[engine](job, missing) if missing else ():
            listener.on_shard(rows)
            interrupts.check()  # threads and other processes write, and there it raises nothing
    return BulkResult(str(out), job.rows, len(job.shards), resumed, time.perf_counter() - start)
