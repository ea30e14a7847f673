"""Measure what a uint8 input saves: bytes and CPU time from body to array, and CPU time of whole requests and of images.

``python -m benchmarks.serving.pixels [CHANNELSxSIZE...]`` prints the table of docs/serving.md. It exports one small network
with both types of input, and measures them in turn: the decoder and the conversion of images in this process, whole requests
with one image as binary tensors over HTTP by the CPU time of one ``bnexport serve`` with both models. It takes 10 minutes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.clock import Spread
from benchmarks.command import finish, options
from benchmarks.serving.process import Running, ask, started
from benchmarks.serving.wires import LENGTH
from bnexport.bundle import Bundle
from bnexport.data.preprocessing import preprocessing_of
from bnexport.environment import describe, environment
from bnexport.exporting.request import ExportRequest
from bnexport.nn.calling import to_eval_mode
from bnexport.pipeline import fold_and_export
from bnexport.serving.protocol.decoding import Decoder
from bnexport.serving.serving_limits import ServingLimits
from bnexport.tensors import ELEMENT_TYPES, Array

_KINDS = ("float32", "uint8")
_ROUNDS, _CALLS, _REQUESTS = 15, 20, 150
_NORMAL = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.286,), (0.353,))}


def exported(folder: Path, channels: int, size: int) -> dict[str, Bundle]:
    """Return the bundles of one small network with both types of input."""
    torch.manual_seed(0)
    first = [nn.Conv2d(channels, 16, 3, 2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.Conv2d(16, 16, 3, 2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    network = to_eval_mode(nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))
    mean, std = _NORMAL[channels]
    for kind in _KINDS:
        request = ExportRequest(input_type=kind, allow_untrained=True, formats=("onnx",))
        fold_and_export(network, folder / kind / "1", request=request, input=(channels, size, size), mean=mean, std=std)
    return {kind: Bundle.open(folder / kind / "1") for kind in _KINDS}


def request_of(bundle: Bundle, image: Array) -> tuple[bytes, int]:
    """Return the body of a request for one image (height, width[, channels]) in binary, and the length of its JSON."""
    preprocessing = preprocessing_of(bundle.manifest)
    assert preprocessing is not None
    array = preprocessing.apply(image[np.newaxis])
    datatype, size = ELEMENT_TYPES[array.dtype.name].datatype, {"binary_data_size": array.nbytes}
    item = {"name": "input", "shape": list(array.shape), "datatype": datatype, "parameters": size}
    head = json.dumps({"inputs": [item], "parameters": {"binary_data_output": True}}).encode()
    return head + array.tobytes(), len(head)


def cpu(call: Callable[[], object], calls: int) -> float:
    """Return the CPU microseconds of one call."""
    begun = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - begun) / calls * 1e6


def decoding(bundles: dict[str, Bundle], image: Array) -> list[dict[str, float]]:
    """Return for each round the CPU time from body to array, by type of input."""
    calls = {}
    for kind, bundle in bundles.items():
        decoder, (body, length) = Decoder(bundle.manifest.signature, ServingLimits()), request_of(bundle, image)
        calls[kind] = partial(decoder.decode, body, length)
    return [{kind: cpu(call, _CALLS) for kind, call in calls.items()} for _ in range(_ROUNDS)]


def converting(bundles: dict[str, Bundle], image: Array) -> list[dict[str, float]]:
    """Return for each round the CPU time of the host's conversion of one image, by type of input."""
    calls = {kind: preprocessing_of(bundle.manifest) for kind, bundle in bundles.items()}
    batch = image[np.newaxis]
    return [
        {kind: cpu(partial(made.apply, batch), _CALLS) for kind, made in calls.items() if made is not None}
        for _ in range(_ROUNDS)
    ]


def requests(bundles: dict[str, Bundle], folder: Path, image: Array) -> list[dict[str, float]]:
    """Return for each round the CPU time of a server per request, by type of input."""
    bodies = {kind: request_of(bundle, image) for kind, bundle in bundles.items()}

    def burst(server: Running, kind: str) -> float:
        body, length = bodies[kind]
        headers = {"content-type": "application/octet-stream", LENGTH: str(length)}
        begun = server.cpu_seconds()
        for _ in range(_REQUESTS):
            status, _, answer = ask(server.ports.http, "POST", f"/v2/models/{kind}/infer", body, headers)
            assert status == 200, answer
        return (server.cpu_seconds() - begun) / _REQUESTS * 1e6

    words = [sys.executable, "-m", "bnexport", "serve", str(folder.resolve()), "--workers", "1", "--host", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with started(lambda ports: [*words, "--port", str(ports.http)], environment) as server:
        server.wait(lambda: ask(server.ports.http, "GET", "/v2/health/ready")[0] == 200)
        for kind in _KINDS:
            burst(server, kind)
        return [{kind: burst(server, kind) for kind in _KINDS} for _ in range(_ROUNDS)]


def row(what: str, rounds: list[dict[str, float]]) -> str:
    """Return a row of the table: the least disturbed time of both, and the ratio of each round."""
    times = [min(times[kind] for times in rounds) for kind in _KINDS]
    ratio = Spread.of([times["float32"] / times["uint8"] for times in rounds])
    cells = [f"{time:,.0f} us" for time in times]
    return f"| {what} | {cells[0]} | {cells[1]} | {ratio.middle:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |"


def measured(channels: int, size: int) -> list[str]:
    """Return the rows of one image size."""
    shape = (size, size, channels) if channels > 1 else (size, size)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = exported(folder, channels, size)
        sizes = [len(request_of(bundles[kind], image)[0]) for kind in _KINDS]
        label = f"{channels}x{size}x{size}"
        return [
            f"| {label}, bytes of a request | {sizes[0]:,} | {sizes[1]:,} | {sizes[0] / sizes[1]:.2f} |",
            row(f"{label}, from body to array", decoding(bundles, image)),
            row(f"{label}, from image to array (`predict`)", converting(bundles, image)),
            row(f"{label}, whole request, with inference", requests(bundles, folder, image)),
        ]


def main() -> None:
    """Print the table in Markdown, and its conditions."""
    parser = options("serving.pixels", __doc__)
    parser.add_argument("sizes", nargs="*", metavar="CHANNELSxSIZE", default=["1x28", "3x224", "3x640"])
    sizes = parser.parse_args().sizes
    lines = ["| CPU time | float32 | uint8 | float32 / uint8 |", "|---|---|---|---|"]
    for shape in sizes:
        channels, _, size = shape.partition("x")
        lines += measured(int(channels), int(size))
    print("\n".join(lines))
    print()
    print(
        f"Least of {_ROUNDS} rounds, and median and range of the ratios within a round; {describe(environment())}; load "
        f"average {os.getloadavg()[0]:.1f}."
    )


if __name__ == "__main__":
    finish("serving.pixels", main)
