"""Inference without a server: onnxruntime's session, one thread, called again and again.

``python -m bnexport.benchmarking.serving_alone BUNDLE SECONDS`` prints one JSON line, in a process of its own as servers are.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bnexport.optional import require
from bnexport.tensors import Array

BATCHES = (1, 8)
_CALLS = 200


def open_session(model: Path) -> Any:
    """A session as every server of the benchmark has it: on the CPU, of one thread.

    Raises:
        MissingDependency: onnxruntime is not here.
    """
    onnxruntime = require("onnxruntime", purpose="the benchmark of serving")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run_alone(model: Path, image: Array, *, seconds: float) -> dict[int, float]:
    """Batch size of BATCHES -> microseconds of CPU time for each image.

    Args:
        model: An ONNX file with one input, "input".
        image: (1, C, H, W).
        seconds: Of each batch size.
    """
    session = open_session(model)
    found: dict[int, float] = {}
    for size in BATCHES:
        feeds = {"input": np.repeat(image, size, axis=0)}
        best = float("inf")
        end = time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < end:
            begun = time.process_time()
            for _ in range(_CALLS):
                session.run(None, feeds)
            best = min(best, (time.process_time() - begun) / (_CALLS * size) * 1e6)
        found[size] = best
    return found


if __name__ == "__main__":
    from bnexport.bundle import Bundle

    bundle = Bundle.open(sys.argv[1])
    print(json.dumps(run_alone(bundle.file("model.onnx"), bundle.golden()[0]["input"][:1], seconds=float(sys.argv[2]))))
