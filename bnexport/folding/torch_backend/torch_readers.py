"""The table of ATen operators: the reader that turns each into a kind of ``folding.graph``."""

from __future__ import annotations

import math
import operator
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from bnexport.folding import graph as kinds
from bnexport.folding.graph import Geometry, Kind, Layer, Weight
from bnexport.folding.torch_backend.nodes import NodeReader, Surroundings, TorchReading, argument, dtype_of, shape_of

aten = torch.ops.aten


def _conv(spatial: int, transposed: bool, node: Node, graph: Surroundings) -> TorchReading | str | None:
    """Read a convolution; its weight is (out, in / groups, *kernel), transposed (in, out / groups, *kernel)."""
    found = _weight_and_bias(node, graph)
    if isinstance(found, str):
        return found
    (weight, bias), shape = found, shape_of(node)
    where: int | str = 1
    if shape is None or len(shape) != spatial + 2:
        where = f"the convolution's input has no batch dimension, so its channels are not on axis 1 of {spatial + 2}"
    geometry = _geometry(node, spatial, transposed, weight.shape)
    # Padding "same" of 2 taps adds a zero at the far end alone, so geometry.padding is 0.
    padded_same = argument(node, 4, "padding", 0) == "same" and any(kernel > 1 for kernel in weight.shape[2:])
    layer = Layer.convolution(
        weight,
        bias,
        transposed=transposed,
        groups=int(argument(node, 6, "groups", 1)),
        out_axis=where,
        in_axis=where,
        geometry=geometry,
        zero_padded=any(geometry.padding) or padded_same,
    )
    return TorchReading(layer, (node.args[0],), 1, 2)


def _weight_and_bias(node: Node, graph: Surroundings) -> tuple[Weight, Weight | None] | str:
    """Return the second and third argument of a layer, or the reason why they are not constants."""
    given = argument(node, 2, "bias")
    weight, bias = graph.weight(node.args[1]), graph.weight(given)
    if weight is None or (bias is None and given is not None):
        return f"its weights are {graph.constants.why_not(node.args[1], given)}"
    return weight, bias


def _geometry(node: Node, spatial: int, transposed: bool, shape: tuple[int, ...]) -> Geometry:
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


def _linear(node: Node, graph: Surroundings) -> TorchReading | str | None:
    """Read ``x W^T + b`` on the last axis."""
    found = _weight_and_bias(node, graph)
    if isinstance(found, str):
        return found
    weight, bias = found
    after = shape_of(node)
    if after is None or shape_of(node.args[0]) is None:
        return None
    axis: int | str = len(after) - 1
    if len(weight.shape) != 2:
        axis = "the linear layer's weight is a vector, so its output has no channel axis"
    layer = Layer("linear layer", "rows", weight, bias, out_axis=axis, in_axis=axis)
    return TorchReading(layer, (node.args[0],), 1, 2)


def _product(node: Node, graph: Surroundings) -> TorchReading | str | None:
    """Read matmul, mm or bmm with one constant: ``x @ W`` or ``W @ x``."""
    right, left = graph.weight(node.args[1]), graph.weight(node.args[0])
    shape = shape_of(node)
    weight = right or left
    value, position = (node.args[0], 1) if right is not None else (node.args[1], 0)
    before = shape_of(value)
    if weight is None or shape is None or before is None:
        return None
    layer = Layer.matrix_product(weight, before, len(shape), right=right is not None)
    return layer if isinstance(layer, str) else TorchReading(layer, (value,), position, None)


def _addmm(node: Node, graph: Surroundings) -> TorchReading | str | None:
    """Read ``b + x @ W``."""
    bias, weight = graph.weight(node.args[0]), graph.weight(node.args[2])
    shape = shape_of(node)
    if bias is None or weight is None or shape is None or len(weight.shape) != 2 or node.kwargs:
        return None
    if bias.shape != (weight.shape[1],):
        return None
    return TorchReading(Layer("linear layer", "right", weight, bias, out_axis=1, in_axis=1), (node.args[1],), 2, 0)


def _of(node: Node, kind: Kind) -> TorchReading:
    return TorchReading(kind, (node.args[0],))


def _as(kind: Kind) -> NodeReader:
    """Return the reader of operators that are always of one kind."""
    return lambda node, _graph: _of(node, kind)


def _dropout(node: Node, _graph: Surroundings) -> TorchReading | None:
    """Read dropout, which returns its input unless it is in training mode."""
    return _of(node, kinds.Identity()) if node.args[2] is False else None


def _cast(node: Node, _graph: Surroundings) -> TorchReading | None:
    """Read a cast to the type that the value already has."""
    return _of(node, kinds.Identity()) if dtype_of(node.args[0]) == dtype_of(node) else None


def _permute(node: Node, _graph: Surroundings) -> TorchReading | None:
    shape = shape_of(node)
    if shape is None:
        return None
    axes = list(range(len(shape)))
    if node.target is aten.permute.default:
        axes = [int(axis) % len(shape) for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif len(shape) > 1:
        first, second = (0, 1) if node.target is aten.t.default else (int(item) for item in node.args[1:3])  # type: ignore[arg-type]
        axes[first], axes[second] = axes[second], axes[first]
    return _of(node, kinds.Permute(tuple(axes)))


def _channel_shuffle(node: Node, _graph: Surroundings) -> TorchReading | None:
    """Read ``channel_shuffle(x, groups)``: channel g * n + i goes to i * groups + g."""
    shape = shape_of(node)
    if shape is None or shape[1] is None:
        return None
    order = torch.arange(shape[1]).reshape(int(node.args[1]), -1).T.reshape(-1)  # type: ignore[arg-type]
    return _of(node, kinds.Reorder(1, tuple(order.tolist())))


def _index_select(node: Node, graph: Surroundings) -> TorchReading | None:
    index, shape = graph.constants.value(node.args[2]), shape_of(node)
    if index is None or shape is None or index.ndim != 1:
        return None
    return _of(node, kinds.Reorder(int(node.args[1]) % len(shape), tuple(index.tolist())))  # type: ignore[arg-type]


def _pixels(inverse: bool, node: Node, _graph: Surroundings) -> TorchReading:
    return _of(node, kinds.PixelShuffle(int(node.args[1]), inverse))  # type: ignore[arg-type]


def _slice(node: Node, _graph: Surroundings) -> TorchReading | None:
    value, axis, start, stop, step = (*node.args, *(None,) * 5)[:5]
    shape = shape_of(value)
    axis = int(axis or 0)  # type: ignore[arg-type]
    size = None if shape is None else shape[axis]
    if shape is None or size is None or step not in (None, 1):
        return None
    if not isinstance(start, (int, type(None))) or not isinstance(stop, (int, type(None))):
        return None
    begin, end, _ = slice(start, stop).indices(size)
    if (begin, end) == (0, size):
        return TorchReading(kinds.Identity(), (value,))
    return TorchReading(kinds.Slice(axis % len(shape), begin, end), (value,))


def _piece(node: Node, _graph: Surroundings) -> TorchReading | None:
    """Read getitem of a split as the slice that this piece is."""
    split, index = node.args
    pieces = split.meta.get("val") if isinstance(split, Node) else None
    if not isinstance(split, Node) or not isinstance(pieces, (list, tuple)) or not isinstance(index, int):
        return None
    if split.target in POOLS_WITH_POSITIONS:
        axes = _last(pieces[0].ndim, POOLS_WITH_POSITIONS[split.target])
        return TorchReading(kinds.WindowMaximum(axes), (split,))
    if split.target not in SPLITS:
        return None
    axis = int(argument(split, 2, "dim", 0))
    sizes = [piece.shape[axis] for piece in pieces]
    if not all(isinstance(size, int) for size in sizes):
        return None
    index %= len(sizes)
    start = sum(sizes[:index])
    return TorchReading(kinds.Slice(axis % pieces[0].ndim, start, start + sizes[index]), (split,))


#: Operators that cut a value into pieces along an axis.
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
#: Operators that give the largest values and their positions -> number of pooled axes.
POOLS_WITH_POSITIONS = {
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
}


def is_whole_slice(node: Node) -> bool:
    """Return True for a slice that takes every position, such as the one of axis 0 in ``x[:, 2:]``."""
    if node.target is not aten.slice.Tensor:
        return False
    start, stop, step = (argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1))
    return start in (None, 0) and step == 1 and (stop is None or (isinstance(stop, int) and stop >= 2**62))


def _concat(node: Node, _graph: Surroundings) -> TorchReading | None:
    shape, parts = shape_of(node), node.args[0]
    if shape is None or not isinstance(parts, (list, tuple)) or not all(isinstance(part, Node) for part in parts):
        return None
    if any(dtype_of(part) != dtype_of(node) or len(shape_of(part) or ()) != len(shape) for part in parts):
        return None
    return TorchReading(kinds.Concat(int(argument(node, 1, "dim", 0)) % len(shape)), tuple(parts))


def _pool(spatial: int, node: Node, _graph: Surroundings) -> TorchReading | None:
    """Read average pooling: exact unless zeros are averaged in or another divisor is used."""
    shape = shape_of(node)
    if shape is None or len(shape) < spatial + 1:
        return None
    padding = argument(node, 3, "padding", 0)
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    counted = padded and bool(argument(node, 5, "count_include_pad", True))
    exact = not counted and argument(node, 6, "divisor_override") is None
    return _of(node, kinds.Average(_last(len(shape), spatial), exact))


def _window(
    kind: type[kinds.Average | kinds.WindowMaximum], spatial: int, node: Node, _graph: Surroundings
) -> TorchReading | None:
    """Read adaptive pooling or interpolation (weights that add up to one), or max pooling (padded with -inf)."""
    shape = shape_of(node)
    return None if shape is None else TorchReading(kind(_last(len(shape), spatial)), (node.args[0],))


def _last(rank: int, spatial: int) -> tuple[int, ...]:
    return tuple(range(rank - spatial, rank))


def _mean(node: Node, _graph: Surroundings) -> TorchReading | None:
    shape = shape_of(node.args[0])
    if shape is None or node.kwargs.get("dtype") is not None:
        return None
    given: Any = node.args[1] if node.target is aten.mean.dim and len(node.args) > 1 else None
    axes = given or range(len(shape))
    keepdim = bool(argument(node, 2, "keepdim", False)) if node.target is aten.mean.dim else False
    return _of(node, kinds.Mean(tuple(sorted(int(axis) % len(shape) for axis in axes)), keepdim))


def _pad(node: Node, _graph: Surroundings) -> TorchReading | None:
    """Read padding with zeros, which a scale can cross, or with copies, which a shift can cross too."""
    shape, amounts = shape_of(node), node.args[1]
    mode = argument(node, 2, "mode", "constant") if node.target is aten.pad.default else "constant"
    value = argument(node, 3 if node.target is aten.pad.default else 2, "value", 0)
    if shape is None or not isinstance(amounts, (list, tuple)) or (mode == "constant" and value not in (0, None)):
        return None
    return _of(node, kinds.Average(_last(len(shape), math.ceil(len(amounts) / 2)), mode != "constant"))


def _clamp(low: Any, high: Any, node: Node, _graph: Surroundings) -> TorchReading | None:
    """Read a clamp; a bound is a number, or position and name of the argument that holds it."""

    def bound(given: Any, absent: float) -> Any:
        found = argument(node, *given) if isinstance(given, tuple) else given
        return absent if found is None else found

    shape = shape_of(node)
    least, most = bound(low, -math.inf), bound(high, math.inf)
    numbers = isinstance(least, int | float) and isinstance(most, int | float)
    if shape is None or dtype_of(node) != dtype_of(node.args[0]) or not numbers:
        return None
    clamp = kinds.Clamp.of(float(least), float(most), len(shape))
    return None if clamp is None else TorchReading(clamp, (node.args[0],))


def _homogeneous(node: Node, graph: Surroundings) -> TorchReading | None:
    if node.target is aten.prelu.default and graph.constants.value(node.args[1]) is None:
        return None
    return _of(node, kinds.Homogeneous())


def _sum(sign: float, node: Node, _graph: Surroundings) -> TorchReading | None:
    """Read ``a + alpha b`` or ``a - alpha b`` of two values."""
    left, right = node.args[:2]
    if not _joins(node, left, right):
        return None
    alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    return TorchReading(kinds.WeightedSum((1.0, sign * alpha)), (left, right)) if alpha else None


def _times(inverse: bool, node: Node, _graph: Surroundings) -> TorchReading | None:
    """Read the product of two values, or their quotient."""
    left, right = node.args[:2]
    if not _joins(node, left, right) or "rounding_mode" in node.kwargs:
        return None
    return TorchReading(kinds.Multiply(inverse), (left, right))


def _joins(node: Node, left: Any, right: Any) -> bool:
    """Return True if two values of one type give a result of that type."""
    return isinstance(left, Node) and isinstance(right, Node) and dtype_of(left) == dtype_of(right) == dtype_of(node)


def _named(*names: str) -> list[Any]:
    """Return operators by name, where this version of torch has them."""
    parts = [name.partition(".") for name in names]
    found = [getattr(getattr(aten, packet, None), overload or "default", None) for packet, _, overload in parts]
    return [operation for operation in found if operation is not None]


#: Number of pooled axes -> adaptive pooling and interpolation, whose weights add up to one.
_AVERAGES = {
    1: ("adaptive_avg_pool1d", "upsample_nearest1d.vec", "_upsample_nearest_exact1d.vec", "upsample_linear1d.vec"),
    2: (
        *("adaptive_avg_pool2d", "upsample_nearest2d.vec", "_upsample_nearest_exact2d.vec", "upsample_bilinear2d.vec"),
        *("upsample_bicubic2d.vec", "_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec"),
    ),
    3: ("adaptive_avg_pool3d", "upsample_nearest3d.vec", "_upsample_nearest_exact3d.vec", "upsample_trilinear3d.vec"),
}

#: Operator -> reader. A new operation that an affine can cross is a new row.
TORCH_READERS: dict[Any, NodeReader] = {
    **dict.fromkeys(_named("conv1d", "conv1d.padding"), partial(_conv, 1, False)),
    **dict.fromkeys(_named("conv2d", "conv2d.padding"), partial(_conv, 2, False)),
    **dict.fromkeys(_named("conv3d", "conv3d.padding"), partial(_conv, 3, False)),
    aten.conv_transpose1d.default: partial(_conv, 1, True),
    aten.conv_transpose2d.input: partial(_conv, 2, True),
    aten.conv_transpose3d.input: partial(_conv, 3, True),
    aten.linear.default: _linear,
    **dict.fromkeys(_named("matmul", "mm", "bmm"), _product),
    aten.addmm.default: _addmm,
    **dict.fromkeys(_named("alias", "clone", "contiguous", "detach", "lift_fresh_copy"), _as(kinds.Identity())),
    **dict.fromkeys(_named("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _dropout),
    **dict.fromkeys(_named("_to_copy", "to.dtype", "to.dtype_layout", "to.device", "type_as"), _cast),
    **dict.fromkeys(_named("view", "reshape", "_unsafe_view", "view_as", "reshape_as"), _as(kinds.Reshape())),
    **dict.fromkeys(_named("flatten.using_ints", "unflatten.int", "unsqueeze"), _as(kinds.Reshape())),
    **dict.fromkeys(_named("squeeze", "squeeze.dim", "squeeze.dims"), _as(kinds.Reshape())),
    **dict.fromkeys(_named("permute", "transpose.int", "t"), _permute),
    **dict.fromkeys(_named("channel_shuffle", "native_channel_shuffle"), _channel_shuffle),
    aten.index_select.default: _index_select,
    aten.pixel_shuffle.default: partial(_pixels, False),
    aten.pixel_unshuffle.default: partial(_pixels, True),
    aten.slice.Tensor: _slice,
    operator.getitem: _piece,
    **dict.fromkeys(_named("cat", "concat", "concatenate"), _concat),
    aten.avg_pool1d.default: partial(_pool, 1),
    aten.avg_pool2d.default: partial(_pool, 2),
    aten.avg_pool3d.default: partial(_pool, 3),
    **{name: partial(_window, kinds.Average, axes) for axes, names in _AVERAGES.items() for name in _named(*names)},
    **dict.fromkeys(_named("mean", "mean.dim"), _mean),
    **dict.fromkeys(_named("pad", "constant_pad_nd"), _pad),
    aten.max_pool1d.default: partial(_window, kinds.WindowMaximum, 1),
    aten.max_pool2d.default: partial(_window, kinds.WindowMaximum, 2),
    aten.max_pool3d.default: partial(_window, kinds.WindowMaximum, 3),
    aten.relu.default: partial(_clamp, 0.0, None),
    aten.relu6.default: partial(_clamp, 0.0, 6.0),
    aten.hardtanh.default: partial(_clamp, (1, "min_val", -1.0), (2, "max_val", 1.0)),
    aten.clamp.default: partial(_clamp, (1, "min"), (2, "max")),
    aten.clamp_min.default: partial(_clamp, (1, "min"), None),
    aten.clamp_max.default: partial(_clamp, None, (1, "max")),
    **dict.fromkeys(_named("leaky_relu", "prelu"), _homogeneous),
    aten.add.Tensor: partial(_sum, 1.0),
    aten.sub.Tensor: partial(_sum, -1.0),
    aten.mul.Tensor: partial(_times, False),
    aten.div.Tensor: partial(_times, True),
}
