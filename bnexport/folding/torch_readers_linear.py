"""How the linear layers of ATen are read."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from bnexport.folding.graph import Geometry, Layer
from bnexport.folding.names import shape_of
from bnexport.folding.torch_reading import Reader, Reading, Surroundings, argument

aten = torch.ops.aten


def read_conv(spatial: int, transposed: bool = False) -> Reader:
    """Convolutions; (out, in / groups, *kernel), transposed (in, out / groups, *kernel)."""

    def read(node: Node, graph: Surroundings) -> Reading | str | None:
        weight, bias = graph.weight(node.args[1]), graph.weight(argument(node, 2, "bias"))
        if weight is None or (bias is None and argument(node, 2, "bias") is not None):
            return "its weights are computed from the input or changed in forward"
        shape = shape_of(node)
        batched = shape is not None and len(shape) == spatial + 2
        where: int | str = 1
        if not batched:
            where = (
                f"the convolution's input has no batch dimension, so its channels are not on axis 1 of {spatial + 2}"
            )
        geometry = _geometry(node, spatial, transposed, weight.shape)
        layer = Layer(
            "transposed convolution" if transposed else "convolution",
            "transposed" if transposed else "rows",
            weight,
            bias,
            groups=int(argument(node, 6, "groups", 1)),
            out_axis=where,
            in_axis=where,
            geometry=geometry,
            zero_padded=geometry is None or any(geometry.padding) or _pads_after(node, weight.shape),
        )
        return Reading(layer, (node.args[0],), 1, 2)

    return read


def _geometry(node: Node, spatial: int, transposed: bool, shape: tuple[int, ...]) -> Geometry | None:
    def each(value: Any) -> tuple[int, ...]:
        found = tuple(int(item) for item in value) if isinstance(value, (list, tuple)) else (int(value),)
        return found * spatial if len(found) == 1 else found

    stride = each(argument(node, 3, "stride", 1))
    padding = argument(node, 4, "padding", 0)
    dilation = each(argument(node, 7 if transposed else 5, "dilation", 1))
    if padding == "valid":
        padding = 0
    if padding == "same":  # zeros on both sides, one more at the far end where the number is odd
        padding = [step * (kernel - 1) // 2 for step, kernel in zip(dilation, shape[2:], strict=True)]
    return Geometry(stride, dilation, each(padding))


def _pads_after(node: Node, shape: tuple[int, ...]) -> bool:
    """An even kernel with padding "same" and dilation 1 of 2 taps has its one zero at the far end."""
    return argument(node, 4, "padding", 0) == "same" and any(kernel > 1 for kernel in shape[2:])


def read_linear(node: Node, graph: Surroundings) -> Reading | str | None:
    """``x W^T + b`` on the last axis."""
    weight, bias = graph.weight(node.args[1]), graph.weight(argument(node, 2, "bias"))
    if weight is None or (bias is None and argument(node, 2, "bias") is not None):
        return "its weights are computed from the input or changed in forward"
    before, after = shape_of(node.args[0]), shape_of(node)
    if before is None or after is None:
        return None
    axis: int | str = len(after) - 1
    if len(weight.shape) != 2:
        axis = "the linear layer's weight is a vector, so its output has no channel axis"
    layer = Layer("linear layer", "rows", weight, bias, out_axis=axis, in_axis=axis)
    return Reading(layer, (node.args[0],), 1, 2)


def read_product(node: Node, graph: Surroundings) -> Reading | str | None:
    """matmul, mm, bmm with one constant: ``x @ W`` or ``W @ x``."""
    right, left = graph.weight(node.args[1]), graph.weight(node.args[0])
    shape = shape_of(node)
    weight = right or left
    if weight is None or shape is None:
        return None
    value = node.args[0] if right is not None else node.args[1]
    before = shape_of(value)
    if before is None or len(before) != len(shape) or not 2 <= len(weight.shape) <= len(shape):
        return "a product with a vector has no channel axis"
    axis = len(shape) - 1 if right is not None else len(shape) - 2
    layer = Layer(
        "matrix product",
        "right" if right is not None else "left",
        weight,
        None,
        out_axis=axis,
        in_axis=axis,
        takes_bias=False,
    )
    return Reading(layer, (value,), 1 if right is not None else 0, None)


def read_addmm(node: Node, graph: Surroundings) -> Reading | str | None:
    """``b + x @ W``."""
    bias, weight = graph.weight(node.args[0]), graph.weight(node.args[2])
    shape = shape_of(node)
    if bias is None or weight is None or shape is None or len(weight.shape) != 2 or node.kwargs:
        return None
    if bias.shape != (weight.shape[1],):
        return None
    return Reading(Layer("linear layer", "right", weight, bias, out_axis=1, in_axis=1), (node.args[1],), 2, 0)
