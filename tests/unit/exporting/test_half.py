from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.bundles import network
from torch import nn

import bnexport
from bnexport.bundle import STORED_PRECISIONS
from bnexport.errors import ExportError, UsageError
from bnexport.exporting.export_onnx import export_onnx
from bnexport.exporting.export_request import ExportRequest, OnnxTarget
from bnexport.exporting.formats import export_torchscript
from bnexport.exporting.half import PRECISIONS, in_precision
from bnexport.exporting.signature import ExportJob, signature_of
from bnexport.onnx_files.float64 import Float64Evaluator

X = torch.from_numpy(np.random.default_rng(1).random((5, 1, 28, 28), dtype=np.float32))
HALVES = {"float16": 10, "bfloat16": 7}  # bits of the mantissa


@pytest.fixture(scope="module")
def folded() -> torch.fx.GraphModule:
    return bnexport.fold(network(), (X,)).model


def test_the_tables_agree_and_float32_is_unchanged(folded: torch.fx.GraphModule) -> None:
    assert tuple(PRECISIONS) == STORED_PRECISIONS
    assert in_precision(folded, (X,), "float32") is folded


@pytest.mark.parametrize("precision", HALVES)
def test_weights_are_rounded_once_and_inputs_and_outputs_stay(folded: torch.fx.GraphModule, precision: str) -> None:
    before = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    half = in_precision(folded, (X,), precision)
    dtype = PRECISIONS[precision]
    for name, tensor in half.state_dict().items():
        assert tensor.dtype is dtype
        assert torch.equal(tensor, before[name].to(dtype))
        assert torch.equal(folded.state_dict()[name], before[name])  # the float32 network is not changed
    with torch.no_grad():
        output, exact = half(X), folded(X)
    assert output.dtype is torch.float32
    error = float((output - exact).abs().max() / exact.abs().max())
    assert 2.0 ** -(HALVES[precision] + 6) < error < 2.0 ** -(HALVES[precision] - 3)


@pytest.mark.parametrize(("precision", "opset", "kind"), [("float16", 18, 10), ("bfloat16", 22, 16)])
def test_the_file_holds_half_weights_and_takes_float32(
    folded: torch.fx.GraphModule, tmp_path: Path, precision: str, opset: int, kind: int
) -> None:
    half = in_precision(folded, (X,), precision)
    signature = signature_of(folded, (X,), input_names=("input",))
    export_onnx(ExportJob(half, (X,), signature, OnnxTarget(opset)), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type in (1, 10, 16)]
    assert len(weights) >= 10
    assert {tensor.data_type for tensor in weights} == {kind}
    exact = folded(X).detach().numpy()
    proof = Float64Evaluator(model).evaluate({"input": X.numpy()})["logits"]
    assert np.abs(proof - exact).max() / np.abs(exact).max() < 2.0 ** -(HALVES[precision] - 2)
    export_torchscript(half, tmp_path / "model.pt")
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    assert torch.equal(loaded(X), half(X))


class Several(nn.Module):
    """Two inputs, one of integers; two outputs, one of integers; a cast and a constant inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.table = nn.Embedding(5, 4)
        self.register_buffer("shift", torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.linear(x + self.table(index)) + self.shift + torch.zeros(3, dtype=torch.float32)
        return {"scores": scores.float(), "best": scores.argmax(1)}


def test_integers_stay_and_float32_arguments_follow() -> None:
    torch.manual_seed(0)
    model = Several().eval()
    x, index = torch.randn(2, 4), torch.tensor([1, 3])
    graph = bnexport.fold(model, (x, index)).model
    half = in_precision(graph, (x, index), "float16")
    out = half(x, index)
    assert out["scores"].dtype is torch.float32
    assert out["best"].dtype is torch.int64
    assert torch.equal(out["scores"], out["scores"].half().float())  # computed in half, cast at the exit
    assert torch.allclose(out["scores"], model(x, index)["scores"], atol=1e-2)


def test_a_weight_that_float16_can_not_hold_is_refused(folded: torch.fx.GraphModule) -> None:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight[0, 0] = 1e5
    x = torch.ones(2, 3)
    graph = bnexport.fold(module.eval(), (x,)).model
    with pytest.raises(ExportError, match=r"1e\+05, and the largest float16 number is 6\.55e\+04"):
        in_precision(graph, (x,), "float16")
    assert in_precision(graph, (x,), "bfloat16")(x).isfinite().all()


def test_requests_that_can_not_be_met() -> None:
    with pytest.raises(UsageError, match="'float8' is not known"):
        ExportRequest(precision="float8")
    with pytest.raises(UsageError, match="operator set 18 has no convolution in bfloat16") as caught:
        ExportRequest(precision="bfloat16")
    assert "--opset 22" in caught.value.remedy
    ExportRequest(precision="bfloat16", onnx=OnnxTarget(22))


def test_a_mask_of_infinities_stays_one() -> None:
    class Masked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(super().forward(x) + self.mask, -1)

    module = Masked(3, 3)
    module.register_buffer("mask", torch.tensor([0, 0, -torch.inf]))
    x = torch.ones(2, 3)
    half = in_precision(bnexport.fold(module.eval(), (x,)).model, (x,), "float16")
    assert torch.equal(half(x)[:, 2], torch.zeros(2))
