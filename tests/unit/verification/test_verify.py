import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.bundles import copy_bundle, flip_bit, network, reseal
from torch import nn

from bnexport.bundle import GOLDEN, Bundle, write_golden
from bnexport.errors import BundleError, DataError, ModelError, RuntimeUnavailable, UsageError
from bnexport.runtimes.catalogue import RUNNERS, RunnerSpec, runner_spec
from bnexport.runtimes.torch_runners import TorchEagerRunner
from bnexport.verification import budget as module_under_test
from bnexport.verification.inputs import Batch
from bnexport.verification.reference import Reference
from bnexport.verification.runs import _RuntimeRun
from bnexport.verification.scope import Scope
from bnexport.verification.verdict import VerificationReport
from bnexport.verification.verify import verify

CPU = [spec.name for spec in RUNNERS if spec.device == "cpu" and spec.default]
FAST = ["onnxruntime-cpu"]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """About a hundred samples per batch, thirty for the proof."""
    for name, work in (("_REAL_WORK", 3e7), ("_SYNTHETIC_WORK", 3e7), ("_PROOF_WORK", 9e6)):
        monkeypatch.setattr(module_under_test, name, work)


@pytest.fixture(scope="module")
def report(bundle: Bundle) -> VerificationReport:
    """A report in strict float32: in bfloat16, OpenVINO's precision of serving, labels of this random network change."""
    return verify(bundle.path, scope=Scope(("float32",)))


def test_the_right_bundle_passes_on_every_cpu_runtime(report: VerificationReport) -> None:
    assert report.passed, report.failures
    assert set(report.runtimes) >= set(CPU)
    for name in CPU:
        stages = {row.stage for row in report.rows if row.subject == name}
        assert stages == {"golden", "strict", "batch-size", "repeat", "precision", "accuracy-change"}
        assert {row.device for row in report.rows if row.subject == name} == {"cpu"}
        cases = [row.case for row in report.rows if row.subject == name and row.stage == "strict"]
        assert cases == ["images", "noise", "zeros", "ones", "one-hot"]
        sizes = [row.case.split(" ")[1] for row in report.rows if row.subject == name and row.stage == "batch-size"]
        assert sizes == ["1", "2", "7", "64", "0"]


def test_the_report_states_what_it_covers(report: VerificationReport) -> None:
    assert "weights.safetensors" in report.reference
    assert report.inputs == "1000 test images of digits"
    assert report.accuracy["n"] == 1000
    assert 250 < report.accuracy["correct"] < 1000
    assert report.environment["packages"]["onnx"]
    assert set(report.skipped) == {spec.name for spec in RUNNERS if spec.default} - set(report.runtimes)
    assert VerificationReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


def test_errors_are_measured_against_float64(report: VerificationReport) -> None:
    proof, strict, golden = (report.worst(stage) for stage in ("file-proof", "strict", "golden"))
    assert proof is not None
    assert strict is not None
    assert golden is not None
    assert 1e-9 < (proof.error or 0) < 2e-7
    assert 1e-8 < (strict.error or 0) < 1e-5
    images = next(row for row in report.rows if row.stage == "strict" and row.case == "images")
    assert images.flips is not None
    assert images.flips.certified > 900
    assert images.flips.unexplained == 0


def test_model_pt_holds_the_weights_of_model_onnx(report: VerificationReport) -> None:
    row = next(row for row in report.rows if row.stage == "weights")
    assert row.passed
    assert row.n == 10


def test_a_changed_file_is_named_and_not_opened(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    flip_bit(folder / "model.onnx")

    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("the changed file was opened")

    monkeypatch.setattr("bnexport.runtimes.onnxruntime.OnnxRuntimeRunner.__init__", never)
    monkeypatch.setattr("bnexport.verification.forecast.Float64Evaluator", never)
    found = verify(folder, runtimes=[*FAST, "torchscript-cpu"])
    assert not found.passed
    assert [row.subject for row in found.failures if row.stage == "integrity"] == ["model.onnx"]
    reasons = {(row.stage, row.subject): row.reason for row in found.failures}
    assert "was changed" in reasons["strict", "onnxruntime-cpu"]
    assert "not opened" in reasons["file-proof", "model.onnx"]
    assert all(row.passed for row in found.rows if row.subject == "torchscript-cpu")


def test_an_extra_and_a_missing_file_fail(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    (folder / "an extra.txt").write_text("hello")
    (folder / "weights.safetensors").unlink()
    found = verify(folder, runtimes=FAST)
    failed = {row.subject for row in found.failures if row.stage == "integrity"}
    assert failed == {"an extra.txt", "weights.safetensors"}
    assert any("no reference could be built" in row.reason for row in found.failures)


def test_damaged_golden_vectors_fail(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    (folder / GOLDEN / "input_0.pb").write_bytes(b"")
    assert any(row.stage == "golden" and "not opened" in row.reason for row in verify(folder, runtimes=FAST).failures)
    found = verify(reseal(folder), runtimes=FAST)
    assert not found.passed


@pytest.mark.parametrize("shape", [("batch", 1, 32, 32), ("batch", 3, 28, 28), (5, 1, 28, 28)])
def test_golden_vectors_of_another_shape_fail(bundle: Bundle, tmp_path: Path, shape: tuple[int | str, ...]) -> None:
    spec = replace(bundle.manifest.signature.inputs[0], shape=shape)
    other = replace(bundle.manifest.signature, inputs=(spec,))
    found = verify(reseal(copy_bundle(bundle, tmp_path / "1"), signature=other), runtimes=FAST)
    assert any(row.stage == "golden" and "expected" in row.reason for row in found.failures)


def test_a_network_that_does_not_fit_its_own_signature_fails(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    spec = replace(bundle.manifest.signature.inputs[0], shape=("batch", 1, 32, 32))
    signature = replace(bundle.manifest.signature, inputs=(spec,))
    zeros = np.zeros((2, 1, 32, 32), np.float32)
    write_golden(folder, signature, {"input": zeros}, {"logits": np.zeros((2, 10))})
    found = verify(reseal(folder, signature=signature), runtimes=FAST)
    assert any(row.stage == "golden-reference" and "can't be evaluated" in row.reason for row in found.failures)
    assert any(row.stage == "declaration" for row in found.failures)


def test_a_folder_that_is_not_a_bundle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        verify(tmp_path / "nothing")


def test_runtimes_by_name(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="runtime 'tensorrt' is unknown"):
        verify(bundle, runtimes=["tensorrt"])
    found = verify(bundle, runtimes=FAST)
    assert list(found.runtimes) == FAST
    assert found.skipped == {}
    for spec in RUNNERS:
        if spec.device == "cuda" and spec.available() is not None:
            with pytest.raises(RuntimeUnavailable, match=f"{spec.name} can't run here"):
                verify(bundle, runtimes=[spec.name])


def test_a_file_that_no_named_runtime_reads_is_proved_where_that_is_cheap_or_requested(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proofs(runtimes: Sequence[str] | None, **scope: bool) -> tuple[set[str], set[str]]:
        found = verify(bundle, runtimes=runtimes, scope=Scope(max_samples=2, **scope))
        assert found.passed
        assert {row.subject for row in found.rows if row.stage == "weights"} == {"model.pt", "model.pt2"}
        skipped = {name.removeprefix("proof of ") for name in found.skipped if name.startswith("proof of ")}
        return {row.subject for row in found.rows if row.stage == "file-proof"}, skipped

    monkeypatch.setattr("bnexport.verification.evidence._SHORT_PROOF", 0)  # as for a large network
    assert proofs(["onnxruntime-cpu"]) == ({"model.onnx"}, {"model.pt", "model.pt2"})
    assert proofs(["torchscript-cpu"]) == ({"model.onnx", "model.pt"}, {"model.pt2"})
    every = {"model.onnx", "model.pt", "model.pt2"}
    assert proofs(["onnxruntime-cpu"], all_files=True) == (every, set())
    assert proofs(["onnxruntime-cpu"], thorough=True) == (every, set())
    assert proofs(None) == (every, set())


def test_a_verification_that_ran_nothing_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_args: object) -> None:
        raise RuntimeUnavailable("x can't run here: no y", remedy="z")

    broken = tuple(replace(spec, opener=unavailable, prober=lambda _device: "no y") for spec in RUNNERS)
    monkeypatch.setattr("bnexport.verification.verify.RUNNERS", broken)
    found = verify(bundle)
    assert not found.passed
    assert found.missing_stages == ("golden", "strict")
    assert set(found.skipped) == {spec.name for spec in RUNNERS if spec.default}


def test_a_missing_gpu_starts_no_process(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tuple(replace(spec, prober=lambda _device: "no GPU") for spec in RUNNERS if spec.device != "cpu")
    monkeypatch.setattr("bnexport.verification.verify.RUNNERS", (runner_spec("onnxruntime-cpu"), *missing))
    monkeypatch.setattr("bnexport.runtimes.isolation.IsolatedRunner", None)
    found = verify(bundle, scope=Scope(max_samples=20, drift=False))
    assert found.passed, found.failures
    assert found.skipped == {spec.name: "no GPU" for spec in missing if spec.default}


def test_a_runtime_that_is_here_but_refuses_the_file_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_args: object) -> None:
        raise RuntimeUnavailable("onnxruntime-cuda fell back: the node 'a' (Det) runs on the CPU", remedy="z")

    here = replace(runner_spec("onnxruntime-cuda"), opener=refuses, prober=lambda _device: None)
    monkeypatch.setattr("bnexport.verification.verify.RUNNERS", (runner_spec("onnxruntime-cpu"), here))
    monkeypatch.setattr("bnexport.runtimes.isolation.IsolatedRunner", refuses)
    few = Scope(max_samples=20, drift=False)
    found = verify(bundle, scope=few)
    assert not found.passed
    assert found.skipped == {}
    (row,) = found.failures
    assert (row.stage, row.subject, row.case) == ("strict", "onnxruntime-cuda", "open")
    assert "the node 'a' (Det) runs on the CPU" in row.reason
    with pytest.raises(RuntimeUnavailable, match=r"the node 'a' \(Det\)"):
        verify(bundle, runtimes=[here], scope=few)


def test_a_bundle_written_without_a_format(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    (folder / "model.pt").unlink()
    without = reseal(folder)
    found = verify(without)
    assert found.passed, found.failures
    assert found.skipped["torchscript-cpu"] == "the bundle was written without model.pt"
    assert not verify(without, runtimes=["torchscript-cpu"]).passed


def test_the_live_module_is_the_first_reference(bundle: Bundle) -> None:
    module = network()
    found = verify(bundle, runtimes=["torch-cpu", *FAST], module=module)
    assert found.passed, found.failures
    assert found.reference == "the original module, in float64"
    assert next(module.parameters()).dtype == torch.float32
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    wrong = verify(bundle, runtimes=FAST, module=other)
    assert {row.stage for row in wrong.failures} >= {"golden-reference", "file-proof", "strict"}


def test_only_the_golden_vectors_represent_a_users_network(bundle: Bundle, tmp_path: Path) -> None:
    foreign = reseal(copy_bundle(bundle, tmp_path / "1"), network={"source": "mine.py:net", "options": {}})
    found = verify(foreign)
    assert found.passed, found.failures
    assert found.reference == (
        "the bundle's golden vectors, not the original network, whose code is not in the bundle (mine.py:net)"
    )
    assert "mine.py:net" in found.skipped["torch-cpu"]
    assert {row.case for row in found.rows if row.stage in ("strict", "file-proof")} == {"golden"}
    with pytest.raises(RuntimeUnavailable, match=r"mine\.py:net"):
        verify(foreign, runtimes=["torch-cpu"])


def test_a_missing_data_folder_is_an_error_only_when_it_was_named(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BNEXPORT_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = reseal(copy_bundle(bundle, tmp_path / "1"), dataset="fashion-mnist", labels=None)
    with pytest.raises(DataError):
        verify(real, runtimes=FAST, data_dir=tmp_path / "nothing")
    assert verify(real, runtimes=FAST).inputs.startswith("no real images: ")


@pytest.mark.needs("data")
def test_all_test_images_of_a_known_data_set_are_used(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "_REAL_WORK", 5e9)
    real = reseal(copy_bundle(bundle, tmp_path / "1"), dataset="fashion-mnist", labels=None)
    found = verify(real, runtimes=FAST, scope=Scope(allow_low_accuracy=True))
    assert found.passed, found.failures
    images = next(row for row in found.rows if row.stage == "strict" and row.case == "images")
    assert images.n == 10_000
    assert images.flips is not None
    assert sum((images.flips.certified, images.flips.uncertain, images.flips.explained)) == 10_000


def test_the_accuracy_at_export_must_come_out_again(bundle: Bundle, tmp_path: Path) -> None:
    report = verify(bundle, runtimes=FAST)
    again = reseal(copy_bundle(bundle, tmp_path / "1"), verification=report.to_json())
    rows = [row for row in verify(again, runtimes=FAST).rows if row.stage == "accuracy"]
    assert [(row.case, row.passed) for row in rows] == [("first image", True), ("images", True)]
    wrong = dict(report.accuracy, correct=report.accuracy["correct"] - 20)
    changed = reseal(again.path, verification={"accuracy": wrong})
    assert [(row.stage, row.case) for row in verify(changed, runtimes=FAST).failures] == [("accuracy", "images")]
    mean, deviation = report.accuracy["first_image"]
    wrong = dict(report.accuracy, first_image=[mean, deviation * 1.05])
    changed = reseal(again.path, verification={"accuracy": wrong})
    assert [(row.stage, row.case) for row in verify(changed, runtimes=FAST).failures] == [("accuracy", "first image")]


def test_the_original_is_evaluated_once_on_each_input(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = Reference.evaluate

    def counting(self: Reference, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(len(feeds["input"]))
        return original(self, feeds)

    monkeypatch.setattr(Reference, "evaluate", counting)
    found = verify(bundle, runtimes=FAST, scope=Scope(max_samples=9))
    golden, cases = [row.n for row in found.rows if row.stage in ("golden", "strict")], 5
    assert len(golden) == 1 + cases
    assert seen == [sum(golden), 0]  # all samples, and an empty batch


def test_a_precision_with_the_kernels_of_float32_is_not_run_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = replace(runner_spec("openvino-cpu"), same_as_float32=lambda _precision: "no bfloat16 here")
    monkeypatch.setattr("bnexport.verification.verify.RUNNERS", (same,))
    found = verify(bundle, scope=Scope(max_samples=4))
    assert (list(found.runtimes), found.skipped) == (["openvino-cpu"], {"openvino-cpu, bfloat16": "no bfloat16 here"})
    alone = verify(bundle, scope=Scope(("bfloat16",), max_samples=4))
    assert list(alone.runtimes) == ["openvino-cpu, bfloat16"]


class Sometimes(TorchEagerRunner):
    """A runner with a fault that only repeats or small batches show."""

    fault = ""
    calls = 0

    def _run(self, feeds):
        outputs = dict(super()._run(feeds))
        self.calls += 1
        n = len(feeds["input"])
        if (self.fault == "jitter" and self.calls % 2) or (self.fault == "batch of seven" and n == 7):
            outputs["logits"] = outputs["logits"] * np.float32(1.001)
        return outputs


@pytest.mark.parametrize(("fault", "stage"), [("", None), ("jitter", "repeat"), ("batch of seven", "batch-size")])
def test_faults_of_repeats_and_batch_sizes_are_seen(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fault: str, stage: str | None
) -> None:
    def open_it(opened: Bundle, *_rest: object) -> TorchEagerRunner:
        runner = Sometimes(network(), opened.manifest.signature)
        runner.fault = fault
        return runner

    spec = RunnerSpec("torch", "cpu", "weights.safetensors", open_it, lambda _device: None)
    monkeypatch.setattr("bnexport.verification.verify.runner_spec", lambda _name: spec)
    failures = verify(bundle, runtimes=["torch-cpu"]).failures
    assert (stage in {row.stage for row in failures}) if stage else failures == ()


@pytest.mark.parametrize(("off", "passed"), [(5e-6, True), (5e-5, False)])
def test_the_scale_of_a_batch_size_is_that_of_the_whole_batch(off: float, *, passed: bool) -> None:
    """Else the rounding of one sample with small outputs is a fault."""
    whole = {"logits": np.array([[0.01, 0.005], [3.0, 2.0]])}
    run = object.__new__(_RuntimeRun)
    run.lead, run.stage = None, "strict"
    run.runner = SimpleNamespace(name="torch-cpu", run=lambda _feeds: {"logits": whole["logits"][:1] + 3 * off})
    row = run._size(Batch("noise", {"input": np.zeros((2, 1))}), whole, 1)
    assert (row.error, row.passed) == (pytest.approx(off), passed)


def test_a_reference_that_is_not_float64_is_refused(bundle: Bundle) -> None:
    class Narrow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :10].half()

    with pytest.raises(ModelError, match="it returns float16"):
        verify(bundle, runtimes=FAST, module=Narrow())


def test_a_reference_in_chunks_is_the_same(bundle: Bundle) -> None:
    reference = Reference(network(), bundle.manifest.signature, description="")
    x = np.random.default_rng(0).random((700, 1, 28, 28), dtype=np.float32)
    whole = reference.evaluate({"input": x})["logits"]
    assert whole.dtype == np.float64
    np.testing.assert_allclose(whole[600:], reference.evaluate({"input": x[600:]})["logits"], rtol=1e-12)
