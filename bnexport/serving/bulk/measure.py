"""How fast a bulk prediction is beside a bare loop over onnxruntime, measured in turn on one machine."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.data.images import map_npy
from bnexport.environment import describe, environment
from bnexport.optional import require
from bnexport.serving.bulk.predict import predict_in_bulk
from bnexport.serving.bulk.request import BulkRequest


class Cost(NamedTuple):
    """Cost of one run.

    Attributes:
        rate: Images per second, from before the first process starts.
        cpu: Microseconds of processor time per image, of all processes; other programs disturb it less.
    """

    rate: float
    cpu: float


def side_by_side(bundle: Bundle, images: Path, *, workers: int, repeats: int = 5) -> str:
    """Return a table in Markdown, with its conditions.

    Args:
        bundle: Bundle of a model that takes grey images as pixel / 255.
        images: A .npy file of uint8 (n, height, width), of the model's size.
        workers: Processes on both sides.
        repeats: Pairs of runs.
    """
    rows = len(map_npy(images))
    bare, ours = [], []
    for _ in range(repeats):
        bare.append(_cost(lambda: _bare(bundle, images, workers), rows))
        with tempfile.TemporaryDirectory() as folder:
            out, request = Path(folder, "out"), BulkRequest(workers=workers)
            ours.append(_cost(functools.partial(predict_in_bulk, bundle, [images], out, request=request), rows))
    pairs = list(zip(bare, ours, strict=True))
    lines = [
        "| what | images/s | CPU time per image, us |",
        "|---|---|---|",
        *(
            f"| {what} | {_spread([cost.rate for cost in costs], 0)} | {_spread([cost.cpu for cost in costs], 1)} |"
            for what, costs in (("bare onnxruntime loop", bare), ("`bnexport predict --out`", ours))
        ),
        f"| share of the bare loop's images | {_spread([own.rate / other.rate for other, own in pairs], 2)} "
        f"| {_spread([other.cpu / own.cpu for other, own in pairs], 2)} |",
        "",
        f"Median (least to most) of n = {repeats} pairs of {rows} images, {workers} workers; load of the machine at the end",
        f"{os.getloadavg()[0]:.1f}; {describe(environment())}.",
    ]
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _cost(run: Callable[[], object], rows: int) -> Cost:
    """Measure one run; children count once they have ended, and both sides wait for theirs."""
    begin, before = time.perf_counter(), _cpu_seconds()
    run()
    return Cost(rows / (time.perf_counter() - begin), (_cpu_seconds() - before) / rows * 1e6)


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its ended children; ``os.times`` counts in steps of 10 ms."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _bare(bundle: Bundle, images: Path, workers: int) -> None:
    """Run processes that scale uint8 to float32 and run batches of 256."""
    cuts = np.linspace(0, len(map_npy(images)), workers + 1).astype(int).tolist()
    same = (str(bundle.file(MODEL_ONNX)), bundle.manifest.signature.inputs[0].name, str(images))
    context = multiprocessing.get_context("spawn")
    tasks = [context.Process(target=_loop, args=(*same, *pair)) for pair in itertools.pairwise(cuts)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()


def _loop(model: str, name: str, images: str, start: int, stop: int) -> None:
    ort = require("onnxruntime", purpose="the bare loop")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    array = np.load(images, mmap_mode="r", allow_pickle=False)
    for at in range(start, stop, 256):
        session.run(None, {name: array[at : min(at + 256, stop), None].astype(np.float32) / np.float32(255)})
