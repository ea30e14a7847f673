"""Verification reports made by hand: one with every part filled in, and a very large one."""

import dataclasses

import numpy as np

from bnexport.verification.verdict import (
    FaultResult,
    Findings,
    FlippedSample,
    Flips,
    LayerDrift,
    NoisePrediction,
    Row,
    VerificationReport,
)

HOSTILE = "</td><script>alert('x')</script><img src=//example.org/x.png onerror=alert(1)>\x1b[31m"
#: Every combination that a sweep of one GPU provider makes.
SETTINGS = tuple(
    ", ".join(part for part in (precision, binding, level, search) if part)
    for precision in ("", "tf32")
    for binding in ("", "IO binding")
    for level in ("", "optimisation basic")
    for search in ("", "exhaustive search", "default search")
)


def run_rows(
    subject: str, settings: str = "", *, error: float = 3.8e-7, predicted: float = 3e-7, flipped: int = 0
) -> list[Row]:
    """Every stage of one run, passed."""
    strict = not any(name in settings for name in ("tf32", "float16"))
    bound = 1e-5 if strict else 3 * predicted
    flips = Flips(990 - flipped, 10, flipped, 0, None if flipped else 0.003)
    common = {"device": subject.rpartition("-")[2], "settings": settings}
    return [
        Row("golden", subject, "golden", True, n=8, error=error / 2, bound=bound, **common),
        Row("strict" if strict else "shipping", subject, "images", True, n=1000, error=error, max_abs=10 * error,
            rms=error, bound=bound, flips=flips, predicted=predicted, **common),
        Row("strict" if strict else "shipping", subject, "noise", True, n=64, error=error / 3, bound=bound, **common),
        Row("batch-size", subject, "batch 1 of 64", True, n=1, error=error / 4, bound=bound, **common),
        Row("batch-size", subject, "batch 0", True, "shape (0, 10)", **common),
        Row("repeat", subject, "images", True, n=1000, error=0.0, bound=bound, **common),
        Row("accuracy-change", subject, "images", True, n=1000,
            reason="871 of 1000 labels right before, 870 after (2 lost, 1 won; exact McNemar p = 1)", **common),
        Row("precision", subject, "images", True, f"{'float32' if strict else 'tf32'} requested: it is", n=64,
            detected="float32" if strict else "tf32", **common),
    ]  # fmt: skip


def file_rows() -> list[Row]:
    return [
        Row("integrity", "model.onnx", "sha256", True, n=1),
        Row("integrity", "model.pt", "sha256", True, n=1),
        Row("golden-reference", "reference", "golden", True, n=8, error=4e-8, bound=1e-6),
        Row("declaration", "model.onnx", "signature", True, n=1),
        Row("file-proof", "model.onnx", "images", True, n=64, error=1.3e-7, bound=1e-6),
        Row("weights", "model.pt", "bits", True, n=10),
        Row("accuracy", "reference", "images", True, "871 of 1000 images right, 871 at export", n=1000),
    ]


def faults() -> tuple[FaultResult, ...]:
    """One of each outcome, one of them hostile."""
    return (
        FaultResult(
            "eps dropped", "model.onnx", "file-proof", ("file-proof", "golden"), "caught", 6.8e-5, "above 1e-06"
        ),
        FaultResult("TF32 left on in strict mode", "onnxruntime-cuda", "precision", ("precision",), "caught"),
        FaultResult("one flipped bit", HOSTILE, "integrity", (), "missed", 1e-4, HOSTILE),
        FaultResult("gamma sign", "bn2, channel 0", "file-proof", (), "harmless", 0.0, "its gamma is 0"),
        FaultResult("wrong preprocessing", "manifest.json", "accuracy", (), "not tried", reason="no images lie here"),
    )


def layers(count: int = 5, first_left: int | None = None) -> tuple[LayerDrift, ...]:
    return tuple(
        LayerDrift(
            f"conv{index}" if index else HOSTILE, "Conv", 2e-4 * (10 if left else 1) * (1 + index % 3), 1.8e-4, left
        )
        for index in range(count)
        for left in (first_left is not None and index >= first_left,)
    )


def changed(count: int = 3, *, explained: bool = True) -> tuple[FlippedSample, ...]:
    return tuple(
        FlippedSample(
            7 * index + 2, index % 10, index % 10, (index + 3) % 10, 0.001 * (index + 1), 0.0007, explained or index > 0
        )
        for index in range(count)
    )


def samples(names: list[str], n: int = 1000, error: float = 3e-8) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    margin = rng.lognormal(-2, 1, n)
    return {name: (error * rng.lognormal(1, 0.5, n), margin) for name in names}


def full_report(*, passed: bool = False) -> VerificationReport:
    """Every optional part filled in; by default it fails: a row failed, and the self-test missed a fault."""
    rows = [
        *file_rows(),
        *run_rows("torch-cpu"),
        *run_rows("onnxruntime-cuda"),
        *run_rows("onnxruntime-cuda", "tf32", error=7.6e-4, predicted=5.8e-4, flipped=3),
    ]
    if not passed:
        rows += [
            Row("strict", "torchscript-cpu", "images", False, "3 labels changed although the margin excludes it", n=1000,
                error=4e-6, bound=1e-5, flips=Flips(990, 7, 0, 3, None)),
            Row("strict", "torchscript-cpu", "zeros", False, HOSTILE, n=2, bound=1e-5),
            Row("golden", HOSTILE, "open", False, "it can't be read"),
        ]  # fmt: skip
    rng = np.random.default_rng(1)
    findings = Findings(
        predictions=(
            NoisePrediction("float32", 3e-7, 8e-8, 2000, 0, "images"),
            NoisePrediction("tf32", 7.6e-4, 1e-4, 2000, 1, "images"),
            NoisePrediction("bfloat16", 9e-3, 2e-3, 16, None, "noise"),
        ),
        drift={"torch-cpu": layers(5), "onnxruntime-cuda, tf32": layers(5, None if passed else 3)},
        flipped={
            "onnxruntime-cuda, tf32": changed(3),
            **({} if passed else {"torchscript-cpu": changed(3, explained=False)}),
        },
        self_test=tuple(fault for fault in faults() if not passed or fault.outcome != "missed"),
        waived={"file-proof": "the float64 proof was not repeated here: onnx is not installed"},
        warnings=(f"{HOSTILE}: synthetic inputs can't show flips",),
    )
    return VerificationReport(
        tuple(rows),
        skipped={"torch-cuda": "torch sees no CUDA device", "weights": HOSTILE},
        runtimes={
            "torch-cpu": {"engine": "torch eager", "device": "cpu"},
            "onnxruntime-cuda, tf32": {"providers": ["CUDAExecutionProvider"], "nodes": {"CUDAExecutionProvider": 9}},
        },
        reference="the original module, in float64",
        inputs="1000 test images of fashion-mnist",
        accuracy={"dataset": "fashion-mnist", "n": 1000, "correct": 871},
        seed=3,
        environment={
            "python": "3.11.7",
            "system": "Linux x86_64",
            "cpu": "a processor",
            "cores": 2,
            "gpu": None,
            "packages": {"numpy": "2.4.6"},
        },
        findings=findings,
        samples={**samples(["torch-cpu", "onnxruntime-cuda"]), **samples(["onnxruntime-cuda, tf32"], error=6e-5)},
        pictures={index: rng.random((1, 28, 28)) for index in (2, 9)},
    )


def large_report() -> VerificationReport:
    """24 runs of one provider, 300 layers each, 500 changed labels with pictures in colour, 60 faults."""
    names = [f"onnxruntime-cuda, {settings}" if settings else "onnxruntime-cuda" for settings in SETTINGS]
    rows = [
        row
        for settings in SETTINGS
        for row in run_rows("onnxruntime-cuda", settings, error=7e-4 if "tf32" in settings else 4e-7, predicted=5e-4)
    ]
    rng = np.random.default_rng(2)
    report = full_report(passed=True)
    return dataclasses.replace(
        report,
        rows=(*file_rows(), *rows),
        runtimes={name: {"engine": "onnxruntime", "options": {"use_tf32": 0}} for name in names},
        findings=Findings(
            drift={name: layers(300, 280 if name == names[-1] else None) for name in names},
            flipped={name: changed(500) for name in names[12:]},
            self_test=tuple(dataclasses.replace(faults()[0], where=f"model.onnx, layer {k}") for k in range(60)),
        ),
        samples=samples(names, n=10_000),
        pictures={7 * k + 2: rng.random((3, 224, 224)) for k in range(64)},
    )
