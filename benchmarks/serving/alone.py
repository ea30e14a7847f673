"""Inference without a server: onnxruntime's session, one thread, called in a loop and after pauses.

``python -m benchmarks.serving.alone BUNDLE SECONDS`` prints one JSON line, from a separate process as servers are.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bnexport.optional import require
from bnexport.tensors import Array

BATCHES = (1, 8)
_CALLS = 200
#: Requested seconds of a pause: less than the kernel's timer slack, so that the pause is as short as possible.
_PAUSE = 2e-5
T = TypeVar("T")


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

    def in_a_loop(size: int) -> float:
        feeds = {"input": np.repeat(image, size, axis=0)}
        begun = time.process_time()
        for _ in range(_CALLS):
            session.run(None, feeds)
        return (time.process_time() - begun) / (_CALLS * size) * 1e6

    def after_pauses() -> tuple[float, float]:
        busy = slept = 0
        for _ in range(_CALLS):
            begun = time.perf_counter_ns()
            time.sleep(_PAUSE)
            slept += time.perf_counter_ns() - begun
            begun = time.thread_time_ns()
            session.run(None, {"input": image})
            busy += time.thread_time_ns() - begun
        return busy / _CALLS * 1e-3, slept / _CALLS * 1e-3

    batches = {size: _best(partial(in_a_loop, size), seconds) for size in BATCHES}
    return Alone(batches, *_best(after_pauses, seconds))


def _best(turn: Callable[[], T], seconds: float) -> T:
    """Return the smallest result of some seconds."""
    end = time.perf_counter() + seconds
    found = [turn()]
    while time.perf_counter() < end:
        found.append(turn())
    return min(found)  # type: ignore[type-var]


if __name__ == "__main__":
    from bnexport.bundle import Bundle

    bundle = Bundle.open(sys.argv[1])
    result = run_alone(bundle.file("model.onnx"), bundle.golden()[0]["input"][:1], seconds=float(sys.argv[2]))
    print(json.dumps(asdict(result)))
