"""A file whose image size varies is run at another size than the one it was exported with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from cases import randomise
from torch import nn

import bnexport
from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.exporting.request import ExportRequest
from bnexport.runtimes.onnx_file import multiplications, read_model
from bnexport.tensors import Signature, TensorSpec
from bnexport.verification.inputs import other_sized_batches

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


def exported(folder: Path) -> tuple[Bundle, nn.Module]:
    torch.manual_seed(0)
    network = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    request = ExportRequest(inputs=("3x12x10",), dynamic_size=True)
    result = bnexport.fold_and_export(network, folder / "sized" / "1", request=request)
    assert result.bundle is not None, result.verification.summary()
    return result.bundle, network


def test_every_engine_runs_another_size(tmp_path: Path) -> None:
    bundle, network = exported(tmp_path)
    report = bnexport.verify(bundle, module=network)
    ran = {row.subject for row in report.rows if row.case == "noise 19x23" and row.passed}
    assert {MODEL_ONNX, "torch-cpu", "torchscript-cpu", "onnxruntime-cpu"} <= ran


def test_an_original_that_takes_no_other_size_fails_the_verdict(tmp_path: Path) -> None:
    bundle, network = exported(tmp_path)

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[2:] != (12, 10):
                raise ValueError("twelve by ten alone")
            return self.inner(x)

    report = bnexport.verify(bundle, module=Stubborn(), runtimes=["onnxruntime-cpu"])
    assert any(row.case == "another size" and not row.passed for row in report.rows)


def test_the_work_is_counted_at_the_exported_size(tmp_path: Path) -> None:
    model = read_model(exported(tmp_path)[0].file(MODEL_ONNX))
    assert multiplications(model) < 4 * 3 * 9 * 2
    assert multiplications(model, {"input": (3, 12, 10)}) >= 4 * 3 * 9 * 10 * 8
