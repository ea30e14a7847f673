"""Absorbers: every linear layer knows how to take in a channel affine that follows it.

For ``z = W x + b`` and ``y = s z + t`` on the output channels, ``y = (s W) x + (s b + t)``: exact for every stride, dilation,
group count and padding, because the affine acts after the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bnexport.folding.affine import ChannelAffine, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Absorber:
    """How one kind of linear layer is read from its node and takes in an affine.

    Attributes:
        kind: As it appears in rule names: "conv", "linear".
        weight: Position of the weight among the operator's arguments.
        bias: Position of the bias.
        channel_axis: The output's channel axis, or a sentence saying why there is none.
        after: ``(weight, bias or None, affine) -> (weight, bias)`` in float64, for an affine after the layer.
    """

    kind: str
    weight: int
    bias: int
    channel_axis: Callable[[Node], int | str]
    after: Callable[[Tensor, Tensor | None, ChannelAffine], tuple[Tensor, Tensor]]

    def weight_node(self, node: Node) -> Node:
        """The node that holds the weight."""
        weight = node.args[self.weight]
        assert isinstance(weight, Node)
        return weight

    def bias_node(self, node: Node) -> Node | None:
        """The node that holds the bias; None without one."""
        bias = node.args[self.bias] if len(node.args) > self.bias else node.kwargs.get("bias")
        return bias if isinstance(bias, Node) else None


def scale_output_channels(weight: Tensor, bias: Tensor | None, affine: ChannelAffine) -> tuple[Tensor, Tensor]:
    """Take in an affine on the first weight axis.

    Args:
        weight: (out, ...) float64: (out, in/groups, *kernel) of a convolution, (out, in) of a linear layer.
        bias: (out,) float64, or None.
        affine: (out,) scale and shift, or a single value for all channels.

    Returns:
        The weight and the bias that do both, float64.
    """
    scale = affine.scale.expand(weight.shape[0])
    shift = affine.shift.expand(weight.shape[0])
    folded = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return folded, shift.clone() if bias is None else scale * bias + shift


def _conv_axis(spatial: int) -> Callable[[Node], int | str]:
    def axis(node: Node) -> int | str:
        shape = shape_of(node)
        if shape is None or len(shape) != spatial + 2:
            return f"the convolution's input has no batch dimension, so its channels are not on axis 1 of {spatial + 2}"
        return 1

    return axis


def _last_axis(node: Node) -> int | str:
    before, after = shape_of(node.args[0]) if isinstance(node.args[0], Node) else None, shape_of(node)
    if before is None or after is None or len(before) != len(after):
        return "the linear layer's weight is a vector, so its output has no channel axis"
    return len(after) - 1


def _conv(spatial: int) -> Absorber:
    return Absorber("conv", 1, 2, _conv_axis(spatial), scale_output_channels)


#: Operator -> absorber. A new linear layer is a new row.
ABSORBERS: dict[Any, Absorber] = {
    aten.conv1d.default: _conv(1),
    aten.conv1d.padding: _conv(1),
    aten.conv2d.default: _conv(2),
    aten.conv2d.padding: _conv(2),
    aten.conv3d.default: _conv(3),
    aten.conv3d.padding: _conv(3),
    aten.linear.default: Absorber("linear", 1, 2, _last_axis, scale_output_channels),
}
