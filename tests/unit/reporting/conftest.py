import numpy as np
import pytest
from support.reports import HOSTILE

from bnexport.bundle import Manifest
from bnexport.folding.fold_report import FoldReport, FoldRow
from bnexport.tensors import Signature, TensorSpec
from bnexport.verification.verdict import Flips, Row, VerificationReport

LONG = "backbone.stage3.block12.attention.projection.normalisation"


@pytest.fixture
def fold() -> FoldReport:
    """One row of each outcome, and one with texts that try to break out."""
    gone = {"channels": 6, "gain": (0.25, 3.2145), "error": 2.3e-16}
    return FoldReport(
        (
            FoldRow("1", "BatchNorm2d", "backward", "conv <- batch norm", "0", "W' = s W, b' = s b + t", dead=1, **gone),
            FoldRow("head.norm", "BatchNorm1d", "forward", "batch norm -> linear", "head.fc", "W' = W s, b' = b + W t", **gone),
            FoldRow("cat", "BatchNorm2d", "through", "backward", "left, right", **gone),
            FoldRow("beside", "BatchNorm2d", "merged", "parallel branches", "3x3", "W' = W + s", **gone),
            FoldRow(
                "", "BatchNorm1d", "affine", reason="before: it follows relu", hint="gammas of one sign", channels=3,
                gain=(0.0, 0.0),
            ),
            FoldRow(LONG, "SyncBatchNorm", "kept", reason=f"{LONG} has a second consumer", channels=960),
            FoldRow(HOSTILE, "BatchNorm2d", "kept", reason="its input is ⟨odd⟩", hint=HOSTILE),
        ),
        remaining=3,
        error=3.1e-15,
        growth=1.25,
        warnings=(f"{HOSTILE}: a fold failed its proof and was rolled back",),
    )  # fmt: skip


@pytest.fixture
def large() -> FoldReport:
    """250 calls: most are gone, three are not."""
    gone = [
        FoldRow(f"stage{index % 4}.block{index}.norm", "BatchNorm2d", "backward", "conv <- batch norm", f"conv{index}",
                "W' = s W, b' = s b + t", channels=64, gain=(0.1, 4.0), dead=index % 3, error=1e-16)
        for index in range(200)
    ]  # fmt: skip
    across = [
        FoldRow(f"dense{index}.norm", "BatchNorm2d", "through", "scale forward", "conv, other",
                "W (s x + t) = (W s) (x + t / s)",
                channels=32, gain=(0.2, 2.0), error=3e-16)
        for index in range(47)
    ]  # fmt: skip
    left = [
        FoldRow(f"{LONG}{index}", "BatchNorm2d", "affine", reason="before: it follows relu", hint="a linear layer after it",
                channels=8, gain=(0.1, 1.0))
        for index in range(3)
    ]  # fmt: skip
    return FoldReport((*gone[:150], *left, *across, *gone[150:]), remaining=3, error=2e-15)


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
