"""Every reason in the fold report is the true one: a small network for each, and what would help."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import Graph, bn, conv, graph, linear, randomise, transposed
from torch import Tensor, nn
from torch.nn import functional

import bnexport

Forward = Callable[[Graph, Tensor], Tensor]


def one_norm(forward: Forward, norm: int = 6, **layers: Callable[[], nn.Module]) -> nn.Module:
    """A network with one BatchNorm, and one convolution of 3 to 6 channels."""
    return randomise(graph(forward, **{"conv": conv(), "bn": bn(norm), **layers})()).eval()


def row_of(model: nn.Module, **options: Any) -> bnexport.folding.fold_report.FoldRow:
    (row,) = bnexport.fold(model, torch.randn(2, 3, 8, 8), **options).report.rows
    assert not row.gone
    return row


def _changed(m: Graph, _x: Tensor) -> Tensor:
    m.conv.weight.mul_(1.0)
    return m.conv.weight


WEIGHTS: dict[str, Forward] = {
    "computed from the input": lambda m, x: m.conv.weight * x.mean(),
    "changed in forward": _changed,
    "drawn at random in forward": lambda m, _x: m.conv.weight + torch.randn(6, 1, 1, 1),
    "made in forward without values": lambda m, _x: m.conv.weight * torch.empty(6, 1, 1, 1),
}


@pytest.mark.parametrize("reason", WEIGHTS)
def test_why_a_weight_is_not_a_constant(reason: str) -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        return m.bn(functional.conv2d(x, WEIGHTS[reason](m, x), m.conv.bias))

    defined = reason != "made in forward without values"  # such memory holds any numbers, and others in the next call
    row = row_of(one_norm(forward), prove=defined)
    assert f"before: it follows conv2d: its weights are {reason};" in row.reason


def _with(name: str, value: float) -> Forward:
    """Return a forward with a number in channel 1 of a tensor of its BatchNorm."""

    def forward(m: Graph, x: Tensor) -> Tensor:
        tensors = {key: getattr(m.bn, key) for key in ("running_mean", "running_var", "weight", "bias")}
        tensors[name] = torch.where(m.bn.channel > 0, value, tensors[name])
        return functional.batch_norm(m.conv(x), **tensors, eps=1e-5)

    return forward


def _in_training(m: Graph, x: Tensor) -> Tensor:
    return functional.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, training=True)


def _from_input(m: Graph, x: Tensor) -> Tensor:
    return functional.batch_norm(m.conv(x), m.bn.running_mean, x.var() * m.bn.running_var)


@pytest.mark.parametrize(
    ("forward", "reason", "hint"),
    [
        (_with("running_var", -1.0), "its variance plus eps is not above 0 in 1 channel,", "a variance and eps"),
        (_with("weight", math.inf), "its statistics or parameters contain infinity, NaN", "finite ones"),
        (_with("running_mean", math.nan), "its statistics or parameters contain infinity, NaN", "finite ones"),
        (_in_training, "it is in training mode, so it uses batch statistics", "training=False in the call"),
        (_from_input, "its statistics or parameters are computed from the input", "that forward does not change"),
    ],
)
def test_the_reason_why_a_batch_norm_can_not_be_read(forward: Forward, reason: str, hint: str) -> None:
    model = one_norm(forward)
    model.bn.register_buffer("channel", torch.tensor([0, 1, 0, 0, 0, 0]))
    row = row_of(model, prove=False)
    assert (row.outcome, reason in row.reason, hint in row.hint) == ("kept", True, True), row


#: Reason -> a forward whose BatchNorm has a scale and a shift.
WITH_SHIFT: dict[str, Forward] = {
    "before: it follows the model's input 'inputs_0', which no rule": lambda m, x: torch.sin(m.bn3(x)) + x,
    "before: it follows flip, which no rule moves a scale and shift across": lambda m, x: m.bn(m.conv(x).flip(2)),
    "its shift can't cross div, a quotient of two values": lambda m, x: m.bn(m.conv(x) / (1 + x.mean())),
    "its shift can't cross mul, a product of two values": lambda m, x: m.bn(m.conv(x) * (1 + x.mean())),
    "its shift can't cross leaky_relu;": lambda m, x: m.bn(functional.leaky_relu(m.conv(x))),
    "after: its shift can't be folded into conv_transpose2d (up), whose output positions use different kernel taps": (
        lambda m, x: m.up(m.bn(torch.sin(m.conv(x))))
    ),
    "it normalises axis 1, the output channels of linear (fc) are on axis 3": lambda m, x: m.bn3(m.fc(x)),
    "before: add repeats conv2d (one) along axis 1, along which it varies": lambda m, x: m.bn(m.conv(x) + m.one(x)),
}


@pytest.mark.parametrize("reason", WITH_SHIFT)
def test_why_a_scale_and_a_shift_stay(reason: str) -> None:
    layers = {"bn3": bn(3), "up": transposed(6, 4, padding=1, stride=2), "fc": linear(8, 7), "one": conv(3, 1)}
    row = row_of(one_norm(WITH_SHIFT[reason], **layers))
    assert (row.outcome, reason in f"{row.reason};") == ("affine", True), row
    assert "padding" not in row.hint


def _scaled(model: nn.Module, gammas: tuple[float, ...], shift: float = 0.0) -> nn.Module:
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor(gammas))
        model.bn.running_mean.zero_()
        model.bn.bias.fill_(shift)
    return model


def test_a_value_that_is_read_twice_by_one_operation_has_no_second_consumer() -> None:
    def forward(m: Graph, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y * y).sin()

    row = row_of(_scaled(one_norm(forward), (1, 2, 3, 4, 5, 6)))
    assert row.reason.startswith("before: mul reads the output of conv2d (conv) 2 times")


@pytest.mark.parametrize(
    ("function", "gammas", "shift", "reason", "hint"),
    [
        (functional.leaky_relu, (1, -2, 3, 4, -5, 6), 0.0,
         "2 of its scales are negative, and leaky_relu has another slope for negative values", "gammas that are not"),
        (lambda y: functional.max_pool2d(y, 2), (1, -2, 3, 4, -5, 6), 1.0,
         "2 of its scales are negative, and max_pool2d keeps the order of values", "gammas that are not"),
        (functional.relu, (1, -2, 3, 4, -5, 6), 1.0,
         "some of its scales are negative, so relu would become two clamps", "gammas of one sign, none of them 0"),
        (functional.relu, (1, 2, 0, 4, 5, 6), 1.0,
         "some of its scales are 0, so relu would become two clamps", "gammas of one sign, none of them 0"),
    ],
)  # fmt: skip
def test_why_a_scale_does_not_cross(
    function: Callable[[Tensor], Tensor], gammas: tuple[float, ...], shift: float, reason: str, hint: str
) -> None:
    model = _scaled(one_norm(lambda m, x: m.bn(function(m.conv(x))).sin()), gammas, shift)
    row = row_of(model, clamps=True)
    assert (reason in row.reason, hint in row.hint) == (True, True), row


def test_a_weight_that_holds_infinity_is_the_reason() -> None:
    model = one_norm(lambda m, x: m.bn(m.conv(x)))
    model.conv.weight.data[2, 1, 0, 0] = math.inf
    row = row_of(model, prove=False)
    assert "before: the folded weight is not finite" in row.reason
    assert "a finite weight" in row.hint


def test_numbers_too_large_for_float32_have_no_wider_type_as_remedy() -> None:
    model = one_norm(lambda m, x: m.bn(m.conv(x)))
    model.conv.weight.data[2, 1, 0, 0] = 3e38
    model.bn.weight.data[2] = 1e3
    row = row_of(model, prove=False)
    assert "before: the folded weight does not fit into torch.float32" in row.reason
    assert "float32 or" not in row.hint
