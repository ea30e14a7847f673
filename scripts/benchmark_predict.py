"""Images per second of bnexport predict --out beside a bare loop over onnxruntime, in turn on one machine.

Use: python scripts/benchmark_predict.py BUNDLE IMAGES.npy [WORKERS]     Prints a table in Markdown.

The bare loop does what nobody can leave out: as many processes as there are workers, each with a session of one thread,
scale uint8 to float32 and run batches of 256; it keeps no answer and writes none. Both times begin before a process starts.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.environment import available_cores, describe, environment
from bnexport.serving.bulk.predict import predict_in_bulk
from bnexport.serving.bulk.request import BulkRequest

REPEATS = 5


def loop(model: str, name: str, images: str, start: int, stop: int) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    array = np.load(images, mmap_mode="r")
    for at in range(start, stop, 256):
        session.run(None, {name: array[at : min(at + 256, stop), None].astype(np.float32) / np.float32(255)})


def bare(bundle: Bundle, images: str, rows: int, workers: int) -> float:
    context = multiprocessing.get_context("spawn")
    cuts = np.linspace(0, rows, workers + 1).astype(int).tolist()
    same = (str(bundle.file(MODEL_ONNX)), bundle.manifest.signature.inputs[0].name, images)
    begin = time.perf_counter()
    tasks = [context.Process(target=loop, args=(*same, *pair)) for pair in itertools.pairwise(cuts)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    return rows / (time.perf_counter() - begin)


def ours(bundle: Bundle, images: str, workers: int) -> float:
    folder = tempfile.mkdtemp()
    result = predict_in_bulk(bundle, [images], Path(folder, "out"), request=BulkRequest(workers=workers))
    shutil.rmtree(folder)
    return result.rows / result.seconds


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("use: python scripts/benchmark_predict.py BUNDLE IMAGES.npy [WORKERS]")
    bundle, images = Bundle.open(sys.argv[1]), sys.argv[2]
    workers = int(sys.argv[3]) if len(sys.argv) == 4 else available_cores()
    rows = len(np.load(images, mmap_mode="r"))
    pairs = [(bare(bundle, images, rows, workers), ours(bundle, images, workers)) for _ in range(REPEATS)]
    print("| what | images/s: median | least | most |\n|---|---|---|---|")
    for what, rates in zip(("bare onnxruntime loop", "bnexport predict --out"), zip(*pairs, strict=True), strict=True):
        print(f"| {what} | {statistics.median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f} |")
    ratios = sorted(own / loop for loop, own in pairs)
    print(
        f"\nRatio, pair by pair: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), n = {REPEATS},"
    )
    print(f"{rows} images, {workers} workers, load {os.getloadavg()[0]:.1f}; {describe(environment())}.")
