"""How fast a bulk prediction is beside a bare loop over onnxruntime, measured in turn on one machine."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.environment import describe, environment
from bnexport.optional import require
from bnexport.serving.bulk.predict import predict_in_bulk
from bnexport.serving.bulk.request import BulkRequest
from bnexport.serving.bulk.sources import map_npy


def side_by_side(bundle: Bundle, images: Path, *, workers: int, repeats: int = 5) -> str:
    """A table in Markdown, with its conditions.

    Args:
        bundle: Of a model that takes grey images as pixel / 255.
        images: A .npy file of uint8 (n, height, width), of the model's size.
        workers: Processes on both sides.
        repeats: Pairs of runs.
    """
    rows = len(map_npy(images))
    bare, ours = [], []
    for _ in range(repeats):
        bare.append(bare_rate(bundle, images, workers=workers))
        with tempfile.TemporaryDirectory() as folder:
            result = predict_in_bulk(bundle, [images], Path(folder, "out"), request=BulkRequest(workers=workers))
        ours.append(result.rows / result.seconds)
    lines = ["| what | images/s: median | least | most |", "|---|---|---|---|"]
    for what, rates in (("bare onnxruntime loop", bare), ("`bnexport predict --out`", ours)):
        lines.append(f"| {what} | {statistics.median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f} |")
    ratios = sorted(own / other for own, other in zip(ours, bare, strict=True))
    lines += [
        "",
        f"Ratio, pair by pair: median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
        f"n = {repeats} pairs of {rows} images, {workers} workers,",
        f"load of the machine at the end {os.getloadavg()[0]:.1f}; {describe(environment())}.",
    ]
    return "\n".join(lines)


def bare_rate(bundle: Bundle, images: Path, *, workers: int) -> float:
    """Images per second of processes that scale uint8 to float32 and run batches of 256, and do nothing else.

    The time begins before the processes start, as that of ``BulkResult`` does.
    """
    rows = len(map_npy(images))
    cuts = np.linspace(0, rows, workers + 1).astype(int).tolist()
    same = (str(bundle.file(MODEL_ONNX)), bundle.manifest.signature.inputs[0].name, str(images))
    context = multiprocessing.get_context("spawn")
    begin = time.perf_counter()
    tasks = [context.Process(target=_loop, args=(*same, *pair)) for pair in itertools.pairwise(cuts)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    return rows / (time.perf_counter() - begin)


def _loop(model: str, name: str, images: str, start: int, stop: int) -> None:
    ort = require("onnxruntime", purpose="the bare loop")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    array = np.load(images, mmap_mode="r", allow_pickle=False)
    for at in range(start, stop, 256):
        session.run(None, {name: array[at : min(at + 256, stop), None].astype(np.float32) / np.float32(255)})
