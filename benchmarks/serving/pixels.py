"""Measure what a uint8 input saves: bytes and CPU time from body to array, and CPU time of whole requests and of images.

``python -m benchmarks.serving.pixels [CHANNELSxSIZE...]`` prints the table of docs/serving.md. It exports one small network
with both types of input, and measures them in turn: the decoder and the conversion of images in this process, whole requests
with one image as binary tensors over HTTP by the CPU time of one ``bnexport serve`` with both models. It takes 10 minutes.
"""

from __future__ import annotations

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
from benchmarks.pages import ranged, table_page
from benchmarks.serving.process import Running, ask, started
from benchmarks.serving.wires import LENGTH, binary_request
from bnexport.bundle import Bundle
from bnexport.data.preprocessing import preprocessing_of
from bnexport.exporting.export_request import ExportRequest
from bnexport.nn.calling import to_eval_mode
from bnexport.pipeline import fold_and_export
from bnexport.serving.protocol.decoding import Decoder
from bnexport.serving.serving_limits import ServingLimits
from bnexport.tensors import Array

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


def request_of(bundle: Bundle, image: Array) -> tuple[dict[str, str], bytes]:
    """Return headers and body of a request for one image (height, width[, channels]) in binary."""
    return binary_request(preprocessing_of(bundle.manifest).apply(image[np.newaxis]), "input")  # type: ignore[union-attr]


def cpu(call: Callable[[], object], calls: int) -> float:
    """Return the CPU microseconds of one call."""
    begun = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - begun) / calls * 1e6


def in_turn(calls: dict[str, Callable[[], object]]) -> list[dict[str, float]]:
    """Return for each round the CPU time of a call, by type of input."""
    return [{kind: cpu(call, _CALLS) for kind, call in calls.items()} for _ in range(_ROUNDS)]


def decoding(bundles: dict[str, Bundle], image: Array) -> dict[str, Callable[[], object]]:
    """Return functions that decode the body of a request to an array, by type of input."""
    calls: dict[str, Callable[[], object]] = {}
    for kind, bundle in bundles.items():
        headers, body = request_of(bundle, image)
        calls[kind] = partial(Decoder(bundle.manifest.signature, ServingLimits()).decode, body, int(headers[LENGTH]))
    return calls


def converting(bundles: dict[str, Bundle], image: Array) -> dict[str, Callable[[], object]]:
    """Return functions that convert one image on the host, by type of input."""
    batch = image[np.newaxis]
    made = {kind: preprocessing_of(bundle.manifest) for kind, bundle in bundles.items()}
    return {kind: partial(each.apply, batch) for kind, each in made.items() if each is not None}


def requests(bundles: dict[str, Bundle], folder: Path, image: Array) -> list[dict[str, float]]:
    """Return for each round the CPU time of a server per request, by type of input."""
    bodies = {kind: request_of(bundle, image) for kind, bundle in bundles.items()}

    def burst(server: Running, kind: str) -> float:
        headers, body = bodies[kind]
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


def row(what: str, rounds: list[dict[str, float]]) -> list[str]:
    """Return a row of the table: the least disturbed time of both, and the ratio of each round."""
    plain, pixels = ([times[kind] for times in rounds] for kind in _KINDS)
    return [what, f"{min(plain):,.0f} us", f"{min(pixels):,.0f} us", ranged(Spread.ratio(plain, pixels))]


def measured(channels: int, size: int) -> list[list[str]]:
    """Return the rows of one image size."""
    shape = (size, size, channels) if channels > 1 else (size, size)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = exported(folder, channels, size)
        sizes = [len(request_of(bundles[kind], image)[1]) for kind in _KINDS]
        label = f"{channels}x{size}x{size}"
        return [
            [f"{label}, bytes of a request", *(f"{count:,}" for count in sizes), f"{sizes[0] / sizes[1]:.2f}"],
            row(f"{label}, from body to array", in_turn(decoding(bundles, image))),
            row(f"{label}, from image to array (`predict`)", in_turn(converting(bundles, image))),
            row(f"{label}, whole request, with inference", requests(bundles, folder, image)),
        ]


def _size(text: str) -> tuple[int, int]:
    channels, size = text.split("x")
    return int(channels), int(size)


def main() -> None:
    """Print the table in Markdown, and its conditions."""
    parser = options("serving.pixels", __doc__)
    default = [(1, 28), (3, 224), (3, 640)]
    parser.add_argument("sizes", nargs="*", type=_size, metavar="CHANNELSxSIZE", default=default)
    rows = [cells for size in parser.parse_args().sizes for cells in measured(*size)]
    conditions = f"Least of {_ROUNDS} rounds, and median and range of the ratios within a round"
    print(table_page(["CPU time", "float32", "uint8", "float32 / uint8"], rows, conditions))


if __name__ == "__main__":
    finish("serving.pixels", main)
