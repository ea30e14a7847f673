"""A file whose image size varies is run at another size than the one it was exported with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from cases import randomise
from support.bundles import copy_bundle
from support.hostile import forge
from torch import nn

import bnexport
from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BundleError, FeedError, RuntimeUnavailable
from bnexport.exporting.export_request import ExportRequest
from bnexport.onnx_files.models import multiplications, read_model
from bnexport.runtimes.onnxruntime import OnnxRuntimeRunner
from bnexport.tensors import Signature, TensorSpec
from bnexport.verification.inputs import other_sized_batches
from bnexport.verification.verdict import Row

IMAGE = TensorSpec("a", "float32", ("batch", 3, "height", "width"))


def test_inputs_of_one_name_change_together() -> None:
    mask = TensorSpec("m", "int64", ("batch", "height", 4))
    golden = {"a": np.zeros((2, 3, 8, 9), np.float32), "m": np.full((2, 8, 4), 5)}
    batches = list(other_sized_batches(Signature((IMAGE, mask), (IMAGE,)), golden, seed=0))
    assert [batch.feeds["a"].shape for batch in batches[:2]] == [(2, 3, 15, 22), (2, 3, 40, 73)]
    assert batches[0].name == "noise 15x22"
    assert batches[0].feeds["m"].shape == (2, 15, 4)
    assert (batches[0].feeds["m"] == 5).all()  # only a value that was seen is known to be valid
    assert batches[0].feeds["a"].std() > 0.5


def test_without_a_varying_size_there_are_none() -> None:
    spec = TensorSpec("a", "float32", ("batch", 3, 8, 9))
    golden = {"a": np.zeros((2, 3, 8, 9), np.float32)}
    assert list(other_sized_batches(Signature((spec,), (spec,)), golden, seed=0)) == []


def sized() -> nn.Module:
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    request = ExportRequest(inputs=("3x12x10",), dynamic_size=True)
    result = bnexport.fold_and_export(sized(), tmp_path_factory.mktemp("made") / "sized" / "1", request=request)
    assert result.bundle is not None, result.verification.summary()
    return result.bundle


@pytest.fixture
def exported(made: Bundle, tmp_path: Path) -> tuple[Bundle, nn.Module]:
    """A copy of the bundle, and its network."""
    return Bundle.open(copy_bundle(made, tmp_path / "1")), sized()


def test_every_engine_runs_another_and_the_smallest_size(exported: tuple[Bundle, nn.Module]) -> None:
    bundle, network = exported
    assert bundle.manifest.signature.inputs[0].smallest == {"height": 3, "width": 3}
    report = bnexport.verify(bundle, module=network)
    for case in ("noise 19x23", "noise 3x3"):
        ran = {row.subject for row in report.rows if row.case == case and row.passed}
        assert {MODEL_ONNX, "torch-cpu", "torchscript-cpu", "onnxruntime-cpu"} <= ran


def test_a_smallest_size_that_the_original_refuses_fails_the_verdict(exported: tuple[Bundle, nn.Module]) -> None:
    bundle, network = exported
    forge(bundle.path, lambda value: value["signature"]["inputs"][0].update(smallest={"height": 2}))
    report = bnexport.verify(bundle.path, module=network, runtimes=["onnxruntime-cpu"])
    failed = {(row.subject, row.case) for row in report.rows if not row.passed}
    assert failed == {("reference", "the smallest size")}


def test_an_engine_may_refuse_the_smallest_size_but_not_answer_it_wrongly(
    exported: tuple[Bundle, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, network = exported
    plain = OnnxRuntimeRunner.run_fitting

    def rows(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Row]:
        def run_fitting(self: OnnxRuntimeRunner, feeds: dict[str, Any]) -> dict[str, Any]:
            outputs = plain(self, feeds)
            return answer(outputs) if feeds["input"].shape[2:] == (3, 3) else outputs

        monkeypatch.setattr(OnnxRuntimeRunner, "run_fitting", run_fitting)
        report = bnexport.verify(bundle, module=network, runtimes=["onnxruntime-cpu"])
        ran = {row.case: row for row in report.rows if row.subject == "onnxruntime-cpu" and row.stage == "strict"}
        assert report.passed == ran["noise 3x3"].passed
        return ran

    def refuse(outputs: dict[str, Any]) -> dict[str, Any]:
        raise BundleError("the window is larger", remedy="none")

    row = rows(refuse)["noise 3x3"]
    assert (row.passed, row.reason) == (True, "this engine refuses the smallest size: the window is larger")

    def fail(outputs: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeUnavailable("out of memory", remedy="none")

    assert (row := rows(fail)["noise 3x3"]).reason == "out of memory"
    assert not row.passed
    ran = rows(lambda outputs: {name: value + 1 for name, value in outputs.items()})
    assert [case for case, row in ran.items() if not row.passed] == ["noise 3x3"]


def test_images_below_the_smallest_size_are_refused(tmp_path: Path) -> None:
    """ONNX Runtime makes one value of a map that is smaller than the window; torch refuses it."""
    network = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.MaxPool2d(2))).eval()
    request = ExportRequest(inputs=("3x12x10",), dynamic_size=True)
    bundle = bnexport.fold_and_export(network, tmp_path / "pooled" / "1", request=request).bundle
    assert bundle is not None
    feeds = {"input": np.ones((1, 3, 5, 6), np.float32)}
    with pytest.raises(RuntimeError, match="too small"):
        network(torch.from_numpy(feeds["input"]))
    session = ort.InferenceSession(bundle.file(MODEL_ONNX), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, feeds)[0]).all()
    with (
        OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature) as runner,
        pytest.raises(FeedError, match="input 'input' has height = 5, the model needs at least 6"),
    ):
        runner.run(feeds)


def test_an_original_that_takes_no_other_size_fails_the_verdict(exported: tuple[Bundle, nn.Module]) -> None:
    bundle, network = exported

    def refuse(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[2:] != (12, 10):
            raise ValueError("twelve by ten alone")

    network.register_forward_pre_hook(refuse)
    report = bnexport.verify(bundle, module=network, runtimes=["onnxruntime-cpu"])
    assert any(row.case == "another size" and not row.passed for row in report.rows)


def test_the_work_is_counted_at_the_exported_size(made: Bundle) -> None:
    model = read_model(made.file(MODEL_ONNX))
    assert multiplications(model) < 4 * 3 * 9 * 2
    assert multiplications(model, {"input": (3, 12, 10)}) >= 4 * 3 * 9 * 10 * 8
