"""Networks in float16 and bfloat16: folded in float64, cast once, and legal for engines that take no mixed types."""

from collections.abc import Callable

import onnx
import pytest
import torch
from cases import randomise
from torch import Tensor, nn

import bnexport

HALVES = [torch.float16, torch.bfloat16]


class KeepsStatisticsWide(nn.Module):
    """The result of ``network.half()`` with the BatchNorms in float32, as in many training recipes."""

    def __init__(self, dtype: torch.dtype, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3).to(dtype), randomise(nn.BatchNorm2d(6))
        self.last, self.activation = nn.BatchNorm2d(6), activation
        randomise(self.last, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.bn(self.conv(x))))


def folded(model: nn.Module, dtype: torch.dtype) -> bnexport.FoldResult:
    torch.manual_seed(0)
    return bnexport.fold(model.eval(), torch.randn(2, 3, 8, 8).to(dtype))


def onnx_types(result: bnexport.FoldResult, dtype: torch.dtype) -> set[int]:
    """Return the element types of all floating tensors of the exported file, which has to pass the checker."""
    program = torch.export.export(result.model, (torch.randn(2, 3, 8, 8).to(dtype),))
    options = {"verbose": False, "optimize": False, "opset_version": 22}  # older convolutions do not support bfloat16
    model = torch.onnx.export(program, dynamo=True, **options).model_proto
    onnx.checker.check_model(model, full_check=True)
    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    return {tensor.data_type for tensor in model.graph.initializer} & floating


@pytest.mark.parametrize("dtype", HALVES)
def test_wide_statistics_on_a_half_network_leave_no_mixed_types(dtype: torch.dtype) -> None:
    model = KeepsStatisticsWide(dtype, torch.nn.functional.gelu)
    result = folded(model, dtype)
    assert [row.outcome for row in result.report.rows] == ["backward", "affine"]
    assert {value.dtype for value in result.model.state_dict().values()} == {dtype}
    wanted = onnx.TensorProto.FLOAT16 if dtype is torch.float16 else onnx.TensorProto.BFLOAT16
    assert onnx_types(result, dtype) == {wanted}
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected, have = model.float()(x), result.model.float()(x)
    bits = {torch.float16: 11, torch.bfloat16: 8}[dtype]
    assert float((have - expected).abs().max()) <= 8 * 2.0**-bits * float(expected.abs().max())


@pytest.mark.parametrize("dtype", HALVES)
def test_the_cast_is_the_last_step(dtype: torch.dtype) -> None:
    model = KeepsStatisticsWide(dtype)
    weight = folded(model, dtype).model.get_parameter("conv.weight")
    scale = model.bn.weight.double() / (model.bn.running_var.double() + model.bn.eps).sqrt()
    exact = (model.conv.weight.double() * scale.reshape(-1, 1, 1, 1)).detach()
    error = float((weight.double() - exact).abs().max())
    assert torch.equal(weight, exact.to(dtype)) or error <= 2.0**-9 * float(exact.abs().max())
    bigger = (weight.double() - exact).abs() > (exact.to(dtype).double() - exact).abs()
    assert not bool(bigger.any())


@pytest.mark.parametrize("dtype", HALVES)
def test_linear_layers_too(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.GELU())).to(dtype).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-1, 1, 7))
    (row,) = bnexport.fold(model, torch.randn(3, 5).to(dtype)).report.rows
    assert row.outcome == "backward"


def test_a_variance_above_float16_does_not_become_infinite() -> None:
    """running_var of 1e6 cast to float16 would be infinity, and every output of the channel its shift."""
    model = KeepsStatisticsWide(torch.float16)
    with torch.no_grad():
        model.bn.running_var[2], model.bn.running_mean[2], model.bn.weight[2] = 1e6, 100.0, 50.0
    result = folded(model, torch.float16)
    assert result.report.rows[0].outcome == "backward"
    channel = result.model.get_parameter("conv.weight")[2].double()
    assert torch.allclose(channel, model.conv.weight[2].double() * 0.05, rtol=2e-3, atol=1e-6)


def test_a_weight_above_float16_stays_unfolded_and_finite() -> None:
    model = KeepsStatisticsWide(torch.float16)
    with torch.no_grad():
        model.bn.running_var.fill_(1e-6)
        model.bn.eps = 1e-12
        model.bn.weight.fill_(1e6)
    result = folded(model, torch.float16)
    assert result.report.rows[0].outcome == "affine"
    assert "float16" in result.report.rows[0].reason
    assert all(
        bool(torch.isfinite(value).all()) for name, value in result.model.state_dict().items() if "running" not in name
    )
