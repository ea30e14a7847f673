"""The table of ONNX operators: the reader that turns each into a kind of ``folding.graph``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from bnexport.folding import graph as kinds
from bnexport.folding.affine import Dim
from bnexport.folding.graph import Geometry, Kind, Layer, Weight
from bnexport.folding.layers import channels_of
from bnexport.folding.onnx_backend.inventory import is_default
from bnexport.folding.onnx_backend.onnx_norms import UNKNOWN_SHAPE, placed_constant, read_arithmetic, read_batch_norm
from bnexport.folding.onnx_backend.view import NodeView, OnnxReading

# --- linear layers: Conv, ConvTranspose, Gemm, MatMul, and MatMul with the Add of its bias -----------------------------

_SAME = ("SAME_UPPER", "SAME_LOWER")


def _conv(view: NodeView) -> OnnxReading | str | None:
    """Read Conv or ConvTranspose; the channels of an ONNX convolution are always on axis 1."""
    weight, bias = view.context.weight(view.input(1)), view.context.weight(view.input(2))
    if weight is None or (bias is None and view.input(2)):
        return view.why_not_constant(1, 2)
    if len(weight.shape) < 3 or view.rank != len(weight.shape):
        return None
    transposed, groups = view.node.op_type == "ConvTranspose", int(view.attribute("group", 1))
    if not _fits(view, "transposed" if transposed else "rows", weight, bias, groups):
        return "its sizes contradict each other"
    geometry = _geometry(view, len(weight.shape) - 2)
    layer = Layer.convolution(
        weight,
        bias,
        transposed=transposed,
        groups=groups,
        geometry=geometry,
        zero_padded=geometry is None or any(view.attribute("pads", ())),
    )
    return OnnxReading(layer, (view.input(0),), (0, 1), (0, 2))


def _fits(view: NodeView, layout: str, weight: Weight, bias: Weight | None, groups: int) -> bool:
    """Return True if groups, channels, kernel and bias fit together, which onnx.checker does not check."""
    shape, value = weight.shape, view.shape()
    if groups < 1 or shape[0] % groups or tuple(view.attribute("kernel_shape", shape[2:])) != shape[2:]:
        return False
    inputs, outputs = channels_of(layout, shape, groups)
    there = inputs if value is None or not isinstance(value[1], int) else value[1]
    return there == inputs and (bias is None or bias.shape == (outputs,))


def _geometry(view: NodeView, spatial: int) -> Geometry | None:
    """Return stride, dilation and padding; None if the padding depends on the input's size."""
    if view.attribute("auto_pad", "NOTSET") in _SAME or view.attribute("output_shape") is not None:
        return None
    ones, pads = (1,) * spatial, tuple(view.attribute("pads", (0,) * (2 * spatial)))
    return Geometry(tuple(view.attribute("strides", ones)), tuple(view.attribute("dilations", ones)), pads[:spatial])


def _gemm(view: NodeView) -> OnnxReading | str | None:
    """Read ``alpha x W + beta c``, W stored as (in, out) or (out, in)."""
    if view.attribute("transA", 0):
        return "it takes its input transposed (transA=1)"
    alpha, beta = float(view.attribute("alpha", 1.0)), float(view.attribute("beta", 1.0))
    weight = view.context.weight(view.input(1), alpha)
    if weight is None:
        return view.why_not_constant(1)
    if len(weight.shape) != 2:
        return None
    rows = bool(view.attribute("transB", 0))
    size = weight.shape[0 if rows else 1]
    bias = _gemm_bias(view, beta, size)
    if isinstance(bias, str):
        return bias
    layer = Layer("linear layer", "rows" if rows else "right", weight, bias, out_axis=1, in_axis=1)
    return OnnxReading(layer, (view.input(0),), (0, 1), (0, 2))


def _gemm_bias(view: NodeView, beta: float, size: int) -> Weight | str | None:
    if not view.input(2):
        return None
    if not view.is_constant(2):
        return view.why_not_constant(2)
    shape = view.context.constants.shape(view.input(2))
    if shape not in ((size,), (1, size), (1,), (1, 1), ()):
        return "its bias differs between rows"
    return view.context.weight(view.input(2), beta, size) or view.why_not_constant(2)


def _matmul(view: NodeView) -> OnnxReading | str | None:
    """Read ``x @ W`` or ``W @ x``; an Add of a vector that follows ``x @ W`` is its bias."""
    right, left = view.context.weight(view.input(1)), view.context.weight(view.input(0))
    weight = right or left
    if weight is None:
        overridable = view.context.constants.overridable & set(view.node.input)
        return view.why_not_constant(0, 1) if overridable else None
    value = 0 if right is not None else 1
    shape = view.shape(value)
    if shape is None or view.rank is None:
        return UNKNOWN_SHAPE
    layer = Layer.matrix_product(weight, shape, view.rank, right=right is not None)
    if isinstance(layer, str):
        return layer
    found = OnnxReading(layer, (view.input(value),), (0, 1 - value), None)
    return _with_bias(view, layer, found) or found


def _with_bias(view: NodeView, layer: Layer, found: OnnxReading) -> OnnxReading | None:
    """Read MatMul and Add as one layer if the Add is the product's only reader and adds one number per output channel."""
    add = view.context.followers.get(view.node.output[0])
    if add is None or add.op_type != "Add" or not is_default(add) or layer.layout != "right":
        return None
    slot = 1 - list(add.input).index(view.node.output[0])
    bias = view.context.weight(add.input[slot])
    if bias is None or bias.shape != (layer.weight.shape[-1],) or bias.dtype != layer.weight.dtype:
        return None
    kind = replace(layer, name="linear layer", bias=bias, takes_bias=True)
    return replace(found, kind=kind, bias=(1, slot), nodes=(add,))


# --- pieces: Split, and SplitToSequence with the SequenceAt of each piece ----------------------------------------------


def read_split(view: NodeView) -> list[OnnxReading] | None:
    """Return one reading per output of a Split."""
    shape = view.shape()
    outputs = [view.context.shapes.of(name) for name in view.node.output]
    if shape is None or any(output is None for output in outputs):
        return None
    axis = int(view.attribute("axis", 0)) % len(shape)
    bounds = _bounds(shape, axis, [output[axis] for output in outputs if output is not None])
    if bounds is None:
        return None
    return [OnnxReading(kinds.Slice(axis, start, stop), (view.input(0),)) for start, stop in bounds]


def read_piece(split: NodeView, at: NodeView) -> OnnxReading | None:
    """Read a SequenceAt of a SplitToSequence."""
    shape, given, index = split.shape(), split.constant(1), at.constant(1)
    if shape is None or given is None or index is None or not split.attribute("keepdims", 1):
        return None
    axis = int(split.attribute("axis", 0)) % len(shape)
    size = shape[axis]
    if not isinstance(size, int):
        return None
    if given.ndim:
        sizes: list[Dim] = [int(item) for item in given]
    else:
        sizes = [min(int(given), size - start) for start in range(0, size, max(int(given), 1))]
    bounds = _bounds(shape, axis, sizes)
    if bounds is None:
        return None
    return OnnxReading(kinds.Slice(axis, *bounds[int(index)]), (split.input(0),), nodes=(at.node,))


def _bounds(shape: tuple[Dim, ...], axis: int, sizes: list[Dim]) -> list[tuple[int, int]] | None:
    """Return start and stop of each piece; None if a size varies, or if the sizes do not add up."""
    start, found = 0, []
    for size in sizes:
        if not isinstance(size, int):
            return None
        found.append((start, start + size))
        start += size
    return found if start == shape[axis] else None


#: Reads a node. The result is None if no kind fits, or a sentence if there is a more specific reason.
OnnxReader = Callable[[NodeView], OnnxReading | str | None]

#: First operator set whose Max and Min broadcast, so that a clamp with one bound per channel can be written.
_BROADCASTING_MAX = 8


def _of(view: NodeView, kind: Kind) -> OnnxReading:
    return OnnxReading(kind, (view.input(0),))


# --- layout -----------------------------------------------------------------------------------------------------------


def _cast(view: NodeView) -> OnnxReading | None:
    return _of(view, kinds.Identity()) if view.is_floating and view.dtype() == view.output_dtype else None


def _dropout(view: NodeView) -> OnnxReading | str:
    if view.uses_output(1):
        return "its mask is used"
    training = view.constant(2) if view.input(2) else None
    if view.input(2) and (training is None or bool(training.any())):
        return "it is in training mode"
    return _of(view, kinds.Identity())


def _reshape(view: NodeView) -> OnnxReading | None:
    return _of(view, kinds.Reshape()) if view.shape() is not None and view.output_shape is not None else None


def _transpose(view: NodeView) -> OnnxReading | None:
    shape = view.shape()
    if shape is None:
        return None
    axes = view.integers("perm") or list(reversed(range(len(shape))))
    return _of(view, kinds.Permute(tuple(axes)))


def _gather(view: NodeView) -> OnnxReading | str | None:
    shape, index = view.shape(), view.constant(1)
    if shape is None or index is None or index.ndim != 1 or view.is_constant(0):
        return None
    axis = int(view.attribute("axis", 0)) % len(shape)
    size = shape[axis]
    if not isinstance(size, int):
        return None
    if any(not -size <= item < size for item in index):
        return f"it takes a position beyond the {size} of its axis"
    return _of(view, kinds.Reorder(axis, tuple(int(item) % size for item in index)))


def _depth_to_space(view: NodeView) -> OnnxReading | str:
    if view.attribute("mode", "DCR") != "CRD":
        return "it spreads each channel's neighbours over distant channels (mode DCR)"
    return _of(view, kinds.PixelShuffle(int(view.attribute("blocksize"))))


def _slice(view: NodeView) -> OnnxReading | None:
    shape = view.shape()
    starts, ends = view.integers("starts", 1), view.integers("ends", 2)
    steps = view.integers("steps", 4) if view.input(4) else None
    if shape is None or starts is None or ends is None or (steps is None) != (not view.input(4)):
        return None
    axes = view.integers("axes", 3) or list(range(len(starts)))
    if (view.input(3) and not view.is_constant(3)) or any(step != 1 for step in steps or ()):
        return None
    cuts = [(axis % len(shape), start, end) for axis, start, end in zip(axes, starts, ends, strict=True)]
    found = [cut for cut in cuts if not _is_whole(shape[cut[0]], cut[1], cut[2])]
    if not found:
        return _of(view, kinds.Identity())
    axis, start, end = found[0]
    size = shape[axis]
    if len(found) > 1 or not isinstance(size, int):
        return None
    begin, stop, _ = slice(start, end).indices(size)
    return _of(view, kinds.Slice(axis, begin, max(stop, begin)))


def _is_whole(size: object, start: int, end: int) -> bool:
    if isinstance(size, int):
        return slice(start, end).indices(size)[:2] == (0, size)
    return start == 0 and end >= 2**31 - 1


def _concat(view: NodeView) -> OnnxReading | None:
    rank, names = view.rank, tuple(view.node.input)
    if rank is None or any(view.is_constant(index) for index in range(len(names))):
        return None
    return OnnxReading(kinds.Concat(int(view.attribute("axis", 1)) % rank), names)


# --- operators that mix positions ---------------------------------------------------------------------------------------------


def _pooled(view: NodeView, kind: Callable[[tuple[int, ...]], Kind]) -> OnnxReading | None:
    """Read an operator that pools all axes after the channels, with the function from these axes to a kind."""
    return None if view.rank is None else _of(view, kind(tuple(range(2, view.rank))))


def _average_pool(view: NodeView) -> OnnxReading | None:
    padded = any(view.attribute("pads", ())) or view.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    counted = bool(view.attribute("count_include_pad", 0)) and (padded or bool(view.attribute("ceil_mode", 0)))
    return _pooled(view, lambda axes: kinds.Average(axes, not counted))


def _max_pool(view: NodeView) -> OnnxReading | str | None:
    return "the positions that it gives are used" if view.uses_output(1) else _pooled(view, kinds.WindowMaximum)


def _reduce_mean(view: NodeView) -> OnnxReading | None:
    shape, axes = view.shape(), view.integers("axes", 1)
    if shape is None or not view.is_floating or (view.input(1) and axes is None):
        return None
    if not axes:
        if view.attribute("noop_with_empty_axes", 0):
            return _of(view, kinds.Identity())
        axes = list(range(len(shape)))
    found = tuple(sorted({axis % len(shape) for axis in axes}))
    if len(found) != len(axes):
        return None
    return _of(view, kinds.Mean(found, bool(view.attribute("keepdims", 1))))


def _resize(view: NodeView) -> OnnxReading | None:
    """Read interpolation: every output is a weighted mean; the weights of every mode add up to one."""
    shape, after = view.shape(), view.output_shape
    if shape is None or after is None or "crop" in view.attribute("coordinate_transformation_mode", ""):
        return None
    if view.node.op_type == "Resize" and view.opset >= 11 and view.input(1) and not view.is_constant(1):
        return None
    listed = [axis % len(shape) for axis in view.integers("axes") or range(len(shape))]
    slot = 1 if view.node.op_type == "Upsample" or view.opset < 11 else 2
    scales = view.attribute("scales") if view.opset < 9 else view.constant(slot)
    if scales is not None and len(scales):
        mixed = [axis for axis, scale in zip(listed, scales, strict=True) if scale != 1]
    elif view.input(slot) and slot == 1:
        return None
    else:  # given as sizes: an axis of unchanged size keeps every position
        kept = view.attribute("keep_aspect_ratio_policy", "stretch") == "stretch"
        mixed = [axis for axis in listed if not kept or shape[axis] != after[axis]]
    return _of(view, kinds.Average(tuple(mixed)))


def _pad(view: NodeView) -> OnnxReading | None:
    shape, mode = view.shape(), view.attribute("mode", "constant")
    pads = view.integers("pads", 1)
    given = view.constant(2) if view.input(2) else None
    if shape is None or pads is None or (view.input(2) and given is None):
        return None
    value = float(given.reshape(-1)[0]) if given is not None and given.size else float(view.attribute("value", 0.0))
    axes = view.integers("axes", 3) if view.input(3) else list(range(len(shape)))
    if axes is None or len(pads) != 2 * len(axes) or (mode == "constant" and value != 0):
        return None
    padded = [axis % len(shape) for at, axis in enumerate(axes) if pads[at] or pads[len(axes) + at]]
    only_cut = all(pad <= 0 for pad in pads)
    return _of(view, kinds.Average(tuple(padded), mode != "constant" or only_cut))


# --- activations ------------------------------------------------------------------------------------------------------


def _clamped(
    view: NodeView, low: torch.Tensor | float, high: torch.Tensor | float, value: int = 0
) -> OnnxReading | str | None:
    shape = view.shape(value)
    if not shape or not view.is_floating:
        return None
    if view.opset < _BROADCASTING_MAX:
        return f"operator set {view.opset} has no maximum with one bound per channel"
    clamp = kinds.Clamp.of(low, high, len(shape))
    return None if clamp is None else OnnxReading(clamp, (view.input(value),))


def _relu(view: NodeView) -> OnnxReading | str | None:
    if view.opset < _BROADCASTING_MAX:
        return _of(view, kinds.Homogeneous())
    return _clamped(view, 0.0, math.inf)


def _clip(view: NodeView) -> OnnxReading | str | None:
    if view.opset < 11:
        low, high = view.attribute("min", -math.inf), view.attribute("max", math.inf)
        return _clamped(view, float(low), float(high))
    bounds = [-math.inf, math.inf]
    for index in (1, 2):
        given = view.constant(index)
        if view.input(index) and (given is None or given.size != 1):
            return None
        if given is not None:
            bounds[index - 1] = float(given.reshape(-1)[0])
    return _clamped(view, bounds[0], bounds[1])


def _extreme(view: NodeView) -> OnnxReading | str | None:
    """Read Max or Min with a constant."""
    if len(view.node.input) != 2 or view.is_constant(0) == view.is_constant(1):
        return None
    value = 1 if view.is_constant(0) else 0
    bound = placed_constant(view, 1 - value, view.shape(value))
    if bound is None or bool(torch.isnan(bound).any()):
        return None
    if view.node.op_type == "Max":
        return _clamped(view, bound, math.inf, value)
    return _clamped(view, -math.inf, bound, value)


def _prelu(view: NodeView) -> OnnxReading | None:
    shape = view.shape()
    if shape is None or not view.is_constant(1) or placed_constant(view, 1, shape) is None:
        return None
    return _of(view, kinds.Homogeneous())


# --- branches ---------------------------------------------------------------------------------------------------------


def _add(view: NodeView) -> OnnxReading | None:
    if len(view.node.input) == 1:  # a Sum of one value
        return _of(view, kinds.Identity())
    return read_arithmetic(view) or _joined(view, kinds.WeightedSum((1.0, 1.0)))


def _joins(kind: Kind) -> OnnxReader:
    """Return the reader of an operator that joins two values by ``kind``, or is arithmetic with a constant."""
    return lambda view: read_arithmetic(view) or _joined(view, kind)


def _joined(view: NodeView, kind: Kind) -> OnnxReading | None:
    """Read an operator with two floating values of one type."""
    two_values = len(view.node.input) == 2 and not view.is_constant(0) and not view.is_constant(1)
    if not two_values or not view.is_floating or view.shape(0) is None or view.shape(1) is None:
        return None
    return OnnxReading(kind, tuple(view.node.input))


#: Operator -> reader. A new operation that an affine can cross is a new row.
ONNX_READERS: dict[str, OnnxReader] = {
    "BatchNormalization": read_batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Identity": lambda view: _of(view, kinds.Identity()),
    **dict.fromkeys(("Cast", "CastLike"), _cast),
    "Dropout": _dropout,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Gather": _gather,
    "DepthToSpace": _depth_to_space,
    "Slice": _slice,
    "Concat": _concat,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda view: _pooled(view, lambda axes: kinds.Mean(axes, keepdim=True)),
    "MaxPool": _max_pool,
    "GlobalMaxPool": _max_pool,
    "ReduceMean": _reduce_mean,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Pad": _pad,
    "Relu": _relu,
    "Clip": _clip,
    **dict.fromkeys(("Max", "Min"), _extreme),
    "LeakyRelu": lambda view: _of(view, kinds.Homogeneous()),
    "PRelu": _prelu,
    "Add": _add,
    "Sum": _add,
    "Sub": _joins(kinds.WeightedSum((1.0, -1.0))),
    "Mul": _joins(kinds.Multiply()),
    "Div": _joins(kinds.Multiply(inverse=True)),
    "Neg": read_arithmetic,
}
