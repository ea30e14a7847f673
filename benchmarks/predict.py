"""Measure the images per second of bnexport predict --out next to a bare loop over onnxruntime, in turn on one machine.

``python -m benchmarks.predict BUNDLE IMAGES.npy [WORKERS]`` prints the table of docs/predicting.md. IMAGES.npy has uint8 grey
images (n, height, width) of the model's size; 60,000 of them take some minutes.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.clock import Spread
from benchmarks.command import finish, options
from benchmarks.pages import ranged, table_page
from benchmarks.serving.alone import open_session
from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.data.images import map_npy
from bnexport.environment import available_cores
from bnexport.errors import RuntimeUnavailable
from bnexport.serving.bulk.bulk_prediction import predict_in_bulk
from bnexport.serving.bulk.bulk_request import BulkRequest


class Cost(NamedTuple):
    """The cost of one run: images per second from before the first process starts, and CPU microseconds per image."""

    rate: float
    cpu: float


def side_by_side(bundle: Bundle, images: Path, *, workers: int, repeats: int = 5) -> str:
    """Return a table in Markdown of pairs of runs; the model takes grey images as pixel / 255."""
    rows = len(map_npy(images))
    model, name = bundle.file(MODEL_ONNX), bundle.manifest.signature.inputs[0].name
    loop = functools.partial(in_processes, workers, rows, _loop, model, name, images)
    bare, ours = [], []
    for _ in range(repeats):
        bare.append(cost_of(loop, rows))
        with tempfile.TemporaryDirectory() as folder:
            out, request = Path(folder, "out"), BulkRequest(workers=workers)
            ours.append(cost_of(functools.partial(predict_in_bulk, bundle, [images], out, request=request), rows))
    cells = [
        [what, ranged(Spread.of([cost.rate for cost in costs]), 0), ranged(Spread.of([cost.cpu for cost in costs]), 1)]
        for what, costs in (("bare onnxruntime loop", bare), ("`bnexport predict --out`", ours))
    ]
    rates = Spread.ratio((cost.rate for cost in ours), (cost.rate for cost in bare))
    times = Spread.ratio((cost.cpu for cost in bare), (cost.cpu for cost in ours))
    cells.append(["share of the bare loop's images", ranged(rates), ranged(times)])
    conditions = f"Median (least to most) of n = {repeats} pairs of {rows} images, {workers} workers"
    return table_page(["what", "images/s", "CPU time per image, us"], cells, conditions)


def cost_of(run: Callable[[], object], rows: int) -> Cost:
    """Measure a run over images; its child processes count, because both sides wait for their end."""
    begin, before = time.perf_counter(), _cpu_seconds()
    run()
    return Cost(rows / (time.perf_counter() - begin), (_cpu_seconds() - before) / rows * 1e6)


def _cpu_seconds() -> float:
    """CPU time of this process and of its ended children; ``os.times`` counts in steps of 10 ms."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def in_processes(count: int, rows: int, loop: Callable[..., None], *arguments: object) -> None:
    """Divide rows among processes that each call ``loop(*arguments, start, stop)``; RuntimeUnavailable if one fails."""
    cuts = np.linspace(0, rows, count + 1).astype(int).tolist()
    context = multiprocessing.get_context("spawn")
    tasks = [context.Process(target=loop, args=(*arguments, *pair)) for pair in itertools.pairwise(cuts)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    if any(task.exitcode for task in tasks):
        raise RuntimeUnavailable("a process of the bare loop failed", remedy="Its error is above")


def _loop(model: Path, name: str, images: Path, start: int, stop: int) -> None:
    """Only scale uint8 to float32 and run batches of 256."""
    session, array = open_session(model), np.load(images, mmap_mode="r", allow_pickle=False)
    for at in range(start, stop, 256):
        session.run(None, {name: array[at : min(at + 256, stop), None].astype(np.float32) / np.float32(255)})


def main() -> None:
    """Measure, and print the table."""
    parser = options("predict", __doc__)
    parser.add_argument("bundle")
    parser.add_argument("images", type=Path)
    parser.add_argument("workers", nargs="?", type=int, default=available_cores())
    given = parser.parse_args()
    print(side_by_side(Bundle.open(given.bundle), given.images, workers=given.workers))


if __name__ == "__main__":
    finish("predict", main)
