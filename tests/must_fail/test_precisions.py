"""Stage 3 on an engine that rounds as a GPU does: right when it is, wrong when it is not, and never wrong for the other.

The engine is emulated, so that every row runs on every machine; real ones are in ``tests/gpu``.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import support.bundles as bundles
from must_fail.test_sabotage import WRONG_WEIGHTS, write_models
from onnx import numpy_helper
from support.bundles import copy_bundle, reseal

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.onnx_files.emulation import Emulator
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.runtimes import catalogue
from bnexport.runtimes.base import Runner, RunSettings
from bnexport.runtimes.catalogue import RunnerSpec
from bnexport.runtimes.reference_runner import EmulatedRunner
from bnexport.verification.scope import Scope
from bnexport.verification.verdict import Row, VerificationReport
from bnexport.verification.verify import verify

Opener = Callable[[Bundle, str, object, RunSettings], Runner]
NAME = "gpu-emulated"
#: "eps dropped" moves outputs ten times less than correct TF32 does.
FAST = ("eps dropped", "two channels swapped", "weights of a later epoch")


def obedient(bundle: Bundle, _device: str, _module: object, settings: RunSettings) -> Runner:
    return EmulatedRunner(bundle, settings.precision)


def always(precision: str) -> Opener:
    return lambda bundle, _device, _module, _settings: EmulatedRunner(bundle, precision)


def install(monkeypatch: pytest.MonkeyPatch, opener: Opener) -> None:
    row = RunnerSpec(
        "gpu", "emulated", MODEL_ONNX, opener, lambda _device: None, served="tf32", precisions=("float32", "tf32")
    )
    monkeypatch.setattr(catalogue, "RUNNERS", (*catalogue.RUNNERS, row))
    monkeypatch.setattr(Scope, "settings_of", unisolated(Scope.settings_of))


def unisolated(settings_of: Callable[..., tuple[RunSettings, ...]]) -> Callable[..., tuple[RunSettings, ...]]:
    """The row exists in this process alone, so a child can't open it."""

    def patched(self: Scope, *arguments: object, **options: object) -> tuple[RunSettings, ...]:
        return tuple(replace(item, isolated=False) for item in settings_of(self, *arguments, **options))

    return patched


def run(bundle: Bundle | Path, **options: object) -> VerificationReport:
    return verify(bundle, runtimes=[NAME], scope=Scope(max_samples=160, **options))


def stages(report: VerificationReport) -> set[tuple[str, str]]:
    return {(row.stage, row.settings) for row in report.failures}


def rows_of(report: VerificationReport, stage: str) -> list[Row]:
    return [row for row in report.rows if row.stage == stage]


def test_an_engine_that_computes_as_requested_passes_both_stages(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, obedient)
    report = run(bundle)
    assert report.passed, report.failures
    strict, shipping = rows_of(report, "strict"), rows_of(report, "shipping")
    assert {row.settings for row in strict} == {""}
    assert {row.settings for row in shipping} == {"tf32"}
    images = shipping[0]
    assert images.case == "images"
    assert images.ratio == pytest.approx(1, rel=1e-3)
    assert images.error is not None
    assert images.error > 1e-4  # so that no bound for strict float32 would let it pass
    assert {(row.settings, row.detected) for row in rows_of(report, "precision")} == {("", "float32"), ("tf32", "tf32")}
    assert set(report.runtimes) == {NAME, f"{NAME}, tf32"}


def truncating(bundle: Bundle, _device: str, _module: object, settings: RunSettings) -> Runner:
    """A GPU that leaves the last bits of float32 unread where TF32 is requested."""
    return EmulatedRunner(bundle, "tf32-cut" if settings.precision == "tf32" else settings.precision)


def test_tf32_that_truncates_is_judged_by_its_own_noise(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes 2 to 6 times the noise of TF32 that rounds to nearest, which left no room below 3, or none at all."""
    install(monkeypatch, truncating)
    report = run(bundle)
    assert report.passed, report.failures
    shipping = rows_of(report, "shipping")
    assert shipping[0].ratio == pytest.approx(1, rel=1e-3)
    assert all(row.ratio is not None and row.ratio < 1.01 for row in shipping)
    feeds, _ = bundle.golden()
    exact = Float64Evaluator(bundle.file(MODEL_ONNX)).evaluate(feeds)["logits"]
    nearest, cut = (Emulator(bundle.file(MODEL_ONNX), name).evaluate(feeds)["logits"] for name in ("tf32", "tf32-cut"))
    assert np.square(cut - exact).mean() > (1.2 * 1.2) * np.square(nearest - exact).mean()
    assert {(row.settings, row.detected) for row in rows_of(report, "precision")} == {
        ("", "float32"),
        ("tf32", "tf32-cut"),
    }
    predicted = next(item for item in report.findings.predictions if item.precision == "tf32")
    assert predicted.error == pytest.approx(shipping[0].predicted, rel=1e-6)  # the larger one of both


@pytest.mark.sampled(3)
@pytest.mark.parametrize("times", [3.5, 5, 7])
def test_no_fault_hides_behind_the_noise_of_truncation(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    """As large as truncation's noise, or below three times as much, but pointing elsewhere."""

    install(monkeypatch, off("tf32", times, slice(None, None, -1)))
    report = run(bundle, precisions=("tf32",))
    images = rows_of(report, "shipping")[0]
    assert not images.passed
    assert images.ratio == pytest.approx(times, rel=1e-2)


def off(precision: str, times: float, order: slice = slice(None)) -> Opener:
    """An engine with the error of a precision, multiplied, and its classes in another ``order``."""

    class Off(EmulatedRunner):
        def __init__(self, bundle: Bundle) -> None:
            super().__init__(bundle, precision)
            self._exact = EmulatedRunner(bundle, "float32")

        def _run(self, feeds: object) -> dict[str, np.ndarray]:
            outputs, exact = super()._run(feeds), self._exact.run(feeds)
            return {name: exact[name] + times * (outputs[name] - exact[name])[:, order] for name in exact}

    return lambda bundle, _device, _module, _settings: Off(bundle)


def test_twice_the_allowed_noise_of_truncation_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, off("tf32-cut", 6))
    images = rows_of(run(bundle, precisions=("tf32",)), "shipping")[0]
    assert not images.passed
    assert images.ratio == pytest.approx(6, rel=0.05)  # of truncation's noise, the largest of four draws


@pytest.mark.parametrize("left_on", ["tf32", "tf32-convolutions", "tf32-cut"])
def test_tf32_left_on_in_strict_mode_is_caught_twice(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, left_on: str
) -> None:
    """torch's default on a GPU is TF32 in convolutions alone."""
    install(monkeypatch, always(left_on))
    report = run(bundle)
    assert {("strict", ""), ("precision", "")} <= stages(report)
    if left_on == "tf32":
        assert not any(settings == "tf32" for _, settings in stages(report))
        assert next(row for row in report.failures if row.stage == "precision").detected == "tf32"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("coarser", ["bfloat16", "bfloat16-products"])
def test_a_coarser_precision_than_requested_is_caught(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, coarser: str
) -> None:
    install(monkeypatch, always(coarser))
    found = stages(run(bundle))
    assert ("shipping", "tf32") in found
    assert ("precision", "tf32") in found


def test_a_finer_precision_than_requested_passes_and_is_reported(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old GPU has no TF32: nothing is wrong, but the report must not state that TF32 was measured."""
    install(monkeypatch, always("float32"))
    report = run(bundle)
    assert report.passed
    assert [row.detected for row in rows_of(report, "precision") if row.settings == "tf32"] == ["float32"]


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in FAST else pytest.mark.slow) for fault in WRONG_WEIGHTS]
)
def test_a_wrong_fold_fails_whatever_the_precision(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    install(monkeypatch, obedient)
    folder = copy_bundle(bundle, tmp_path / "1")
    write_models(folder, WRONG_WEIGHTS[fault]())
    report = run(reseal(folder), precisions=("tf32",))
    assert any(row.stage == "file-proof" for row in report.failures)


def test_twice_the_allowed_noise_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, off("tf32", 7))
    report = run(bundle, precisions=("tf32",))
    failed = [row for row in report.failures if row.stage == "shipping"]
    assert failed
    assert any("x the predicted noise, allowed 3 x" in row.reason for row in failed)


def test_without_strict_float32_a_runtime_proves_only_the_shipping_precision(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, obedient)
    report = run(bundle, precisions=("tf32",))
    assert report.passed
    assert not rows_of(report, "strict")
    assert bundle.manifest.signature == bundles.SIGNATURE


def test_a_manifest_that_claims_a_coarser_precision_to_widen_the_bounds_fails(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    write_models(folder, WRONG_WEIGHTS["eps dropped"]())
    lying = {**bundle.manifest.onnx, "precision": "float16"}
    report = verify(reseal(folder, onnx=lying), runtimes=["onnxruntime-cpu"], scope=Scope(max_samples=100))
    assert {"declaration", "file-proof"} <= {row.stage for row in report.failures}
    assert any("in float32, the manifest states float16" in row.reason for row in report.failures)


def halve(folder: Path) -> None:
    """Store the weights of model.onnx in float16, and compute in it between inputs and outputs in float32."""
    model = onnx.load(folder / MODEL_ONNX)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for node in model.graph.node:
        node.input[:] = ["input_half" if name == "input" else name for name in node.input]
    model.graph.node[-1].output[0] = "logits_half"
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["input"], ["input_half"], to=10))
    model.graph.node.append(onnx.helper.make_node("Cast", ["logits_half"], ["logits"], to=1))
    del model.graph.value_info[:]
    onnx.save(model, folder / MODEL_ONNX)


def test_a_wrong_fold_in_half_precision_fails(bundle: Bundle, tmp_path: Path) -> None:
    """The rounding of the weights widens the bound of the proof, but not up to a fault of a few per cent."""
    declared = {**bundle.manifest.onnx, "precision": "float16"}
    right, wrong = copy_bundle(bundle, tmp_path / "1"), copy_bundle(bundle, tmp_path / "2")
    write_models(wrong, WRONG_WEIGHTS["another eps, 1e-3"]())
    for folder in (right, wrong):
        halve(folder)
        for other in ("model.pt", "model.pt2"):
            (folder / other).unlink(missing_ok=True)
    scope = Scope(max_samples=100)
    good = verify(reseal(right, onnx=declared), runtimes=["onnxruntime-cpu"], scope=scope)
    assert good.passed, good.failures
    assert {row.stage for row in good.rows if row.subject == "onnxruntime-cpu"} >= {"golden", "shipping"}
    bad = verify(reseal(wrong, onnx=declared), runtimes=["onnxruntime-cpu"], scope=scope)
    assert any(row.stage == "file-proof" for row in bad.failures)
