"""Inference without a server: onnxruntime's session, one thread, called in a loop and after pauses.

``python -m benchmarks.serving.alone BUNDLE SECONDS`` prints one JSON line, from a separate process as servers are.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnexport.optional import require
from bnexport.tensors import Array

BATCHES = (1, 8)
_CALLS = 200
#: Requested seconds of a pause: less than the kernel's timer slack, so that the pause is as short as possible.
_PAUSE = 2e-5


@dataclass(frozen=True)
class Alone:
    """Microseconds of the engine without a server."""

    batches: Mapping[int, float]  # batch size of BATCHES -> CPU time per image in a loop
    rested: float  # CPU time of one image after a pause, in which the core sleeps
    pause: float  # length of such a pause


def open_session(model: Path) -> Any:
    """Open a session as every server of the benchmark does: on the CPU, with one thread."""
    onnxruntime = require("onnxruntime", purpose="the benchmark of serving")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run_alone(model: Path, image: Array, *, seconds: float) -> Alone:
    """Measure an ONNX file with one input, "input"; each figure is the best of several hundred calls in a row.

    ``image``: (1, C, H, W); ``seconds``: of each batch size, and of the calls after pauses.
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
    return Alone(found, *_after_pauses(session, {"input": image}, seconds))


def _after_pauses(session: Any, feeds: Mapping[str, Array], seconds: float) -> tuple[float, float]:
    """Microseconds of CPU time of a call after a pause, and of the pause."""
    best = pause = float("inf")
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        busy = slept = 0
        for _ in range(_CALLS):
            begun = time.perf_counter_ns()
            time.sleep(_PAUSE)
            slept += time.perf_counter_ns() - begun
            begun = time.thread_time_ns()
            session.run(None, feeds)
            busy += time.thread_time_ns() - begun
        best, pause = min((best, pause), (busy / _CALLS * 1e-3, slept / _CALLS * 1e-3))
    return best, pause


if __name__ == "__main__":
    from bnexport.bundle import Bundle

    bundle = Bundle.open(sys.argv[1])
    result = run_alone(bundle.file("model.onnx"), bundle.golden()[0]["input"][:1], seconds=float(sys.argv[2]))
    print(json.dumps(asdict(result)))
