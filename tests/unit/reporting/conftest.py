from __future__ import annotations

import numpy as np
import pytest

from bnexport.bundle import Manifest
from bnexport.folding.report import FoldReport, FoldRow
from bnexport.tensors import Signature, TensorSpec
from bnexport.verification.verdict import Flips, Row, VerificationReport

HOSTILE = "</td><script>alert('x')</script><img src=//example.org/x.png onerror=alert(1)>\x1b[31m"
LONG = "backbone.stage3.block12.attention.projection.normalisation"


@pytest.fixture
def fold() -> FoldReport:
    return FoldReport(
        (
            FoldRow("1", "BatchNorm2d", "folded", "conv-bn", "0", "", 6, 3.2145),
            FoldRow("", "BatchNorm1d", "affine", "lone", "", "no linear layer before it", 3, 0.0),
            FoldRow(LONG, "SyncBatchNorm", "kept", "", "", f"{LONG} has a second consumer", 960, None),
            FoldRow(HOSTILE, "BatchNorm2d", "kept", "", "", "its input is ⟨odd⟩", 0, None),
        ),
        remaining=2,
        error=3.1e-15,
    )


def strict_rows(runtime: str) -> list[Row]:
    images = Row("strict", runtime, "images", True, n=1000, error=3.8e-7, max_abs=4e-6, rms=1e-7, bound=1e-5)
    noise = Row("strict", runtime, "noise", True, n=64, error=9.1e-8, bound=1e-5)
    flips = Flips(certified=998, uncertain=2, explained=0, unexplained=0, rate_bound=0.003)
    return [Row(**{**vars(images), "flips": flips, "device": "cpu"}), noise]


@pytest.fixture
def passing() -> VerificationReport:
    rows = [
        Row("integrity", "model.onnx", "SHA-256", True, n=1),
        Row("integrity", "model.pt", "SHA-256", True, n=1),
        Row("golden", "onnxruntime-cpu", "golden", True, n=8, error=2.1e-7, bound=1e-5, device="cpu"),
        Row("file-proof", "model.onnx", "images", True, n=64, error=4.4e-8, bound=1e-6),
        *strict_rows("torch-cpu"),
        *strict_rows("onnxruntime-cpu"),
    ]
    return VerificationReport(
        tuple(rows),
        skipped={"torch-cuda": "torch sees no CUDA device"},
        runtimes={"onnxruntime-cpu": {"engine": "onnxruntime", "providers": ["CPUExecutionProvider"]}},
        reference="the unfolded network in float64",
        inputs="1000 test images",
        accuracy={"dataset": "fashion-mnist", "n": 1000, "correct": 871},
    )


@pytest.fixture
def failing(passing: VerificationReport) -> VerificationReport:
    rows = (
        Row("strict", "onnxruntime-cpu", "ones", False, "12 values are not finite", n=2, error=None, bound=1e-5),
        Row("strict", "torch-cpu", "zeros", False, HOSTILE, n=2, error=4e-3, bound=1e-5, flips=Flips(0, 0, 1, 1, None)),
    )
    return VerificationReport(passing.rows + rows, runtimes=passing.runtimes)


@pytest.fixture
def manifest() -> Manifest:
    signature = Signature(
        (TensorSpec("input", "float32", ("batch", 1, 28, 28)),), (TensorSpec("logits", "float32", ("batch", 10)),)
    )
    return Manifest(
        "bn_lenet",
        3,
        signature,
        {"source": "bn_lenet", "options": {"norm": "torch"}},
        dataset="fashion-mnist",
        preprocessing={"channels": 1, "mean": [0.0]},
        labels=("Trouser", HOSTILE),
        onnx={"opset": 18, "ir_version": 8},
    )


@pytest.fixture
def samples() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    margin = rng.lognormal(-2, 1, 300)
    return {
        name: (rng.lognormal(-16, 0.5, 300), margin) for name in ("torch-cpu", "torchscript-cpu", "onnxruntime-cpu")
    }
