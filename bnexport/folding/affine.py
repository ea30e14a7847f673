"""Readers: everything that acts like a BatchNorm in eval mode is read into one ChannelAffine.

In eval mode a BatchNorm is the affine map ``y = gamma * (x - moving_mean) / sqrt(moving_var + eps) + beta`` (Ioffe and
Szegedy 2015, algorithm 2), so ``scale = gamma / sqrt(moving_var + eps)`` and ``shift = beta - scale * moving_mean``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bnexport.folding.constants import Constants

aten = torch.ops.aten


@dataclass(frozen=True)
class ChannelAffine:
    """What a BatchNorm in eval mode does: ``y = scale * x + shift``, per channel.

    Attributes:
        scale: (channels,) float64.
        shift: (channels,) float64.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def from_statistics(
        cls, mean: Tensor, var: Tensor, eps: float, gamma: Tensor | None = None, beta: Tensor | None = None
    ) -> ChannelAffine:
        """From moving statistics and the learned scale and shift, each (channels,).

        ``affine=False`` (gamma and beta None) means a scale of one and a shift of zero.
        """
        scale = torch.rsqrt(var.double() + eps)
        if gamma is not None:
            scale = gamma.double() * scale
        shift = -scale * mean.double()
        return cls(scale, shift if beta is None else beta.double() + shift)

    def after(self, first: ChannelAffine) -> ChannelAffine:
        """The map ``x -> self(first(x))``; one of the two may have a single channel that stands for all."""
        return ChannelAffine(self.scale * first.scale, self.scale * first.shift + self.shift)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.scale.numel()


@dataclass(frozen=True)
class AffineStep:
    """One graph node read as a channel affine.

    Attributes:
        value: The node that the affine is applied to.
        affine: What is applied; None when the node is a BatchNorm that can't be read.
        axis: The channel axis of ``value``; None when the affine is the same for every element.
        why_not: Why the node can't be read, as a sentence without its full stop.
    """

    value: Node
    affine: ChannelAffine | None
    axis: int | None
    why_not: str | None = None


Reader = Callable[[Node, Constants], AffineStep | None]


def read_batch_norm(node: Node, constants: Constants) -> AffineStep | None:
    """``aten.batch_norm``: nn.BatchNorm1d/2d/3d, SyncBatchNorm in eval mode, F.batch_norm, any subclass."""
    value, gamma, beta, mean, var, training = node.args[:6]
    eps = float(node.args[7])  # type: ignore[arg-type]
    if not isinstance(value, Node):
        return None
    if mean is None or var is None:
        return AffineStep(
            value, None, 1, "it keeps no moving statistics (track_running_stats=False), so it uses batch statistics"
        )
    if training:
        return AffineStep(value, None, 1, "it is in training mode, so it uses batch statistics")
    found = [None if item is None else constants.value(item) for item in (gamma, beta, mean, var)]
    if any(item is not None and tensor is None for item, tensor in zip((gamma, beta, mean, var), found, strict=True)):
        return AffineStep(
            value, None, 1, "its statistics or parameters are computed from the input or changed in forward"
        )
    assert found[2] is not None
    assert found[3] is not None
    return AffineStep(value, ChannelAffine.from_statistics(found[2], found[3], eps, found[0], found[1]), 1)


def read_elementwise(node: Node, constants: Constants) -> AffineStep | None:
    """``x + c``, ``x - c``, ``c - x``, ``x * c``, ``x / c`` with a constant of one value per channel, or one value."""
    left, right = node.args[:2]
    alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    left_constant, right_constant = constants.value(left), constants.value(right)
    if (left_constant is None) == (right_constant is None):
        return None
    value, constant = (left, right_constant) if left_constant is None else (right, left_constant)
    if not isinstance(value, Node) or constant is None or not constant.is_floating_point():
        return None
    placed = _channel_axis(value, constant)
    if placed is None:
        return None
    axis, vector = placed
    pair = _ELEMENTWISE[node.target](vector, alpha, left_constant is not None)
    return None if pair is None else AffineStep(value, ChannelAffine(*pair), axis)


def _add(constant: Tensor, alpha: float, constant_first: bool) -> tuple[Tensor, Tensor]:
    if constant_first:  # c + alpha * x
        return torch.full_like(constant, alpha), constant
    return torch.ones_like(constant), alpha * constant


def _sub(constant: Tensor, alpha: float, constant_first: bool) -> tuple[Tensor, Tensor]:
    if constant_first:  # c - alpha * x
        return torch.full_like(constant, -alpha), constant
    return torch.ones_like(constant), -alpha * constant


def _mul(constant: Tensor, _alpha: float, _constant_first: bool) -> tuple[Tensor, Tensor]:
    return constant, torch.zeros_like(constant)


def _div(constant: Tensor, _alpha: float, constant_first: bool) -> tuple[Tensor, Tensor] | None:
    if constant_first:  # c / x is not affine
        return None
    return constant.reciprocal(), torch.zeros_like(constant)


_ELEMENTWISE: dict[Any, Callable[[Tensor, float, bool], tuple[Tensor, Tensor] | None]] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    operator.add: _add,
    operator.sub: _sub,
    operator.mul: _mul,
    operator.truediv: _div,
}

#: Operator -> reader. A new norm is a new row.
READERS: dict[Any, Reader] = {
    aten.batch_norm.default: read_batch_norm,
    **dict.fromkeys(_ELEMENTWISE, read_elementwise),
}


def _channel_axis(value: Node, constant: Tensor) -> tuple[int | None, Tensor] | None:
    """Where a constant is broadcast: (axis, one value per channel), or None when it is not per channel.

    A constant whose size differs from the value's along the axis would enlarge the value; that is no affine map.
    """
    shape = shape_of(value)
    if shape is None or constant.ndim > len(shape):
        return None
    if constant.numel() == 1:
        return None, constant.reshape(1)
    wide = [axis for axis, size in enumerate(constant.shape) if size != 1]
    if len(wide) != 1:
        return None
    axis = wide[0] + len(shape) - constant.ndim
    if shape[axis] != constant.numel():
        return None
    return axis, constant.reshape(-1)


def shape_of(node: Node) -> tuple[int | None, ...] | None:
    """Shape of a node's value as traced, None for a dimension that varies; None when it is not a tensor.

    A symbolic size is never compared with a number: in torch that would pin it to that number.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def dtype_of(node: Node) -> torch.dtype | None:
    """Element type of a node's value as traced; None when it is not a tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None
