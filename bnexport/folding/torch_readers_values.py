"""How the operators of ATen that move, mix, bound and join values are read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bnexport.folding.graph import (
    Add,
    Average,
    Clamp,
    Concat,
    Homogeneous,
    Identity,
    MaxPool,
    Mean,
    Multiply,
    Permute,
    PixelShuffle,
    Reorder,
    Reshape,
    Slice,
)
from bnexport.folding.names import dtype_of, shape_of
from bnexport.folding.torch_reading import Reader, Reading, Surroundings, argument

aten = torch.ops.aten


def read_same(node: Node, _graph: Surroundings) -> Reading:
    """What hands on its input."""
    return Reading(Identity(), (node.args[0],))


def read_dropout(node: Node, _graph: Surroundings) -> Reading | None:
    """Dropout hands on its input unless it is in training mode."""
    return Reading(Identity(), (node.args[0],)) if node.args[2] is False else None


def read_cast(node: Node, _graph: Surroundings) -> Reading | None:
    """A cast to the type that the value has already."""
    return Reading(Identity(), (node.args[0],)) if dtype_of(node.args[0]) == dtype_of(node) else None


def read_reshape(node: Node, _graph: Surroundings) -> Reading:
    """Another shape, the same order of elements."""
    return Reading(Reshape(), (node.args[0],))


def read_permute(node: Node, _graph: Surroundings) -> Reading | None:
    """permute, transpose, t."""
    shape = shape_of(node)
    if shape is None:
        return None
    axes = list(range(len(shape)))
    if node.target is aten.permute.default:
        axes = [int(axis) % len(shape) for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif len(shape) > 1:
        first, second = (0, 1) if node.target is aten.t.default else (int(item) for item in node.args[1:3])  # type: ignore[arg-type]
        axes[first], axes[second] = axes[second], axes[first]
    return Reading(Permute(tuple(axes)), (node.args[0],))


def read_channel_shuffle(node: Node, _graph: Surroundings) -> Reading | None:
    """``channel_shuffle(x, groups)``: channel g * n + i goes to i * groups + g."""
    shape = shape_of(node)
    if shape is None or shape[1] is None:
        return None
    order = torch.arange(shape[1]).reshape(int(node.args[1]), -1).T.reshape(-1)  # type: ignore[arg-type]
    return Reading(Reorder(1, tuple(order.tolist())), (node.args[0],))


def read_index_select(node: Node, graph: Surroundings) -> Reading | None:
    """Positions of an axis by a constant index."""
    index, shape = graph.constants.value(node.args[2]), shape_of(node)
    if index is None or shape is None or index.ndim != 1:
        return None
    return Reading(Reorder(int(node.args[1]) % len(shape), tuple(index.tolist())), (node.args[0],))  # type: ignore[arg-type]


def read_pixels(inverse: bool) -> Reader:
    """pixel_shuffle and pixel_unshuffle."""

    def read(node: Node, _graph: Surroundings) -> Reading:
        return Reading(PixelShuffle(int(node.args[1]), inverse), (node.args[0],))  # type: ignore[arg-type]

    return read


def read_slice(node: Node, _graph: Surroundings) -> Reading | None:
    """A slice with constant ends and step 1."""
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
        return Reading(Identity(), (value,))
    return Reading(Slice(axis % len(shape), begin, end), (value,))


def read_piece(node: Node, _graph: Surroundings) -> Reading | None:
    """Getitem of a split: positions that the pieces before it leave."""
    split, index = node.args
    pieces = split.meta.get("val") if isinstance(split, Node) else None
    if not isinstance(split, Node) or not isinstance(pieces, (list, tuple)) or not isinstance(index, int):
        return None
    if split.target in POOLS_WITH_POSITIONS:
        return Reading(MaxPool(_last(len(pieces[0].shape), POOLS_WITH_POSITIONS[split.target])), (split,))
    if split.target not in SPLITS:
        return None
    axis = int(argument(split, 2, "dim", 0))
    sizes = [piece.shape[axis] for piece in pieces]
    if not all(isinstance(size, int) for size in sizes):
        return None
    index %= len(sizes)
    start = sum(sizes[:index])
    rank = len(pieces[0].shape)
    return Reading(Slice(axis % rank, start, start + sizes[index]), (split,))


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
    """A slice that takes every position, such as the one of axis 0 in ``x[:, 2:]``."""
    if node.target is not aten.slice.Tensor:
        return False
    start, stop, step = (argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1))
    return start in (None, 0) and step == 1 and (stop is None or (isinstance(stop, int) and stop >= 2**62))


def read_concat(node: Node, _graph: Surroundings) -> Reading | None:
    """Concatenation of values of one type and rank."""
    shape, parts = shape_of(node), node.args[0]
    if shape is None or not isinstance(parts, (list, tuple)) or not all(isinstance(part, Node) for part in parts):
        return None
    if any(dtype_of(part) != dtype_of(node) or len(shape_of(part) or ()) != len(shape) for part in parts):
        return None
    return Reading(Concat(int(argument(node, 1, "dim", 0)) % len(shape)), tuple(parts))


def read_pool(spatial: int) -> Reader:
    """Average pooling; exact unless zeros are averaged in or another divisor is used."""

    def read(node: Node, _graph: Surroundings) -> Reading | None:
        shape = shape_of(node)
        if shape is None or len(shape) < spatial + 1:
            return None
        padding = argument(node, 3, "padding", 0)
        padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
        counted = bool(argument(node, 5, "count_include_pad", True))
        divisor = argument(node, 6, "divisor_override")
        exact = (not padded or not counted) and divisor is None
        return Reading(Average(_last(len(shape), spatial), exact), (node.args[0],))

    return read


def read_averaging(spatial: int) -> Reader:
    """Adaptive average pooling and interpolation: weights that add up to one."""

    def read(node: Node, _graph: Surroundings) -> Reading | None:
        shape = shape_of(node)
        return None if shape is None else Reading(Average(_last(len(shape), spatial)), (node.args[0],))

    return read


def read_max_pool(spatial: int) -> Reader:
    """Max pooling; its padding is minus infinity."""

    def read(node: Node, _graph: Surroundings) -> Reading | None:
        shape = shape_of(node)
        return None if shape is None else Reading(MaxPool(_last(len(shape), spatial)), (node.args[0],))

    return read


def _last(rank: int, spatial: int) -> tuple[int, ...]:
    return tuple(range(rank - spatial, rank))


def read_mean(node: Node, _graph: Surroundings) -> Reading | None:
    """The mean over axes, or over all."""
    shape = shape_of(node.args[0])
    if shape is None or node.kwargs.get("dtype") is not None:
        return None
    given: Any = node.args[1] if node.target is aten.mean.dim and len(node.args) > 1 else None
    axes = given or range(len(shape))
    keepdim = bool(argument(node, 2, "keepdim", False)) if node.target is aten.mean.dim else False
    return Reading(Mean(tuple(sorted(int(axis) % len(shape) for axis in axes)), keepdim), (node.args[0],))


def read_pad(node: Node, _graph: Surroundings) -> Reading | None:
    """Padding by zeros (a scale crosses it) or by copies (a shift too)."""
    shape, amounts = shape_of(node), node.args[1]
    mode = argument(node, 2, "mode", "constant") if node.target is aten.pad.default else "constant"
    value = argument(node, 3 if node.target is aten.pad.default else 2, "value", 0)
    if shape is None or not isinstance(amounts, (list, tuple)) or (mode == "constant" and value not in (0, None)):
        return None
    return Reading(Average(_last(len(shape), math.ceil(len(amounts) / 2)), mode != "constant"), (node.args[0],))


def read_clamp(low: Any, high: Any) -> Reader:
    """Bounds: a number, or the position and name of the argument that holds one."""

    def bound(node: Node, given: Any, absent: float) -> Any:
        found = argument(node, *given) if isinstance(given, tuple) else given
        return absent if found is None else found

    def read(node: Node, _graph: Surroundings) -> Reading | None:
        shape = shape_of(node)
        least, most = bound(node, low, -math.inf), bound(node, high, math.inf)
        if (
            shape is None
            or dtype_of(node) != dtype_of(node.args[0])
            or not all(isinstance(b, (int, float)) for b in (least, most))
        ):
            return None
        if least > most:
            return None
        ones: Tensor = torch.ones([1] * len(shape), dtype=torch.float64)
        return Reading(Clamp(least * ones, most * ones), (node.args[0],))

    return read


def read_homogeneous(node: Node, graph: Surroundings) -> Reading | None:
    """LeakyReLU, and PReLU with constant slopes."""
    if node.target is aten.prelu.default and graph.constants.value(node.args[1]) is None:
        return None
    return Reading(Homogeneous(), (node.args[0],))


def read_sum(sign: float) -> Reader:
    """``a + alpha b`` or ``a - alpha b`` of two values."""

    def read(node: Node, _graph: Surroundings) -> Reading | None:
        left, right = node.args[:2]
        if not _joins(node, left, right):
            return None
        alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        return Reading(Add((1.0, sign * alpha)), (left, right)) if alpha else None

    return read


def read_times(inverse: bool) -> Reader:
    """The product of two values, or their quotient."""

    def read(node: Node, _graph: Surroundings) -> Reading | None:
        left, right = node.args[:2]
        if not _joins(node, left, right) or "rounding_mode" in node.kwargs:
            return None
        return Reading(Multiply(inverse), (left, right))

    return read


def _joins(node: Node, left: Any, right: Any) -> bool:
    """Whether two floating values of one type are joined."""
    return isinstance(left, Node) and isinstance(right, Node) and dtype_of(left) == dtype_of(right) == dtype_of(node)
