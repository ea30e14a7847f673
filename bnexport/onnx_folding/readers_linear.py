"""Readers of linear layers: Conv, ConvTranspose, Gemm, MatMul, and MatMul with the Add of its bias."""

from __future__ import annotations

from dataclasses import replace

from bnexport.folding.graph import Geometry, Layer, Weight
from bnexport.folding.layers import channels_of
from bnexport.onnx_folding.inventory import is_default
from bnexport.onnx_folding.view import Reading, View

_SAME = ("SAME_UPPER", "SAME_LOWER")


def read_conv(view: View) -> Reading | str | None:
    """Conv and ConvTranspose; the channels of an ONNX convolution are always on axis 1."""
    weight, bias = view.context.weight(view.input(1)), view.context.weight(view.input(2))
    if weight is None or (bias is None and view.input(2)):
        return view.why_no_weight(1, 2)
    if len(weight.shape) < 3 or view.rank != len(weight.shape):
        return None
    transposed, groups = view.node.op_type == "ConvTranspose", int(view.attribute("group", 1))
    if not _fits(view, "transposed" if transposed else "rows", weight, bias, groups):
        return "its sizes contradict each other"
    geometry = _geometry(view, len(weight.shape) - 2)
    layer = Layer(
        "transposed convolution" if transposed else "convolution",
        "transposed" if transposed else "rows",
        weight,
        bias,
        groups=groups,
        geometry=geometry,
        zero_padded=geometry is None or any(view.attribute("pads", ())),
    )
    return Reading(layer, (view.input(0),), (0, 1), (0, 2))


def _fits(view: View, layout: str, weight: Weight, bias: Weight | None, groups: int) -> bool:
    """Whether groups, channels and bias go together: the checker does not look."""
    shape, value = weight.shape, view.shape()
    if groups < 1 or shape[0] % groups:
        return False
    inputs, outputs = channels_of(layout, shape, groups)
    there = inputs if value is None or not isinstance(value[1], int) else value[1]
    return there == inputs and (bias is None or bias.shape == (outputs,))


def _geometry(view: View, spatial: int) -> Geometry | None:
    """None where the padding follows from the input's size."""
    if view.attribute("auto_pad", "NOTSET") in _SAME or view.attribute("output_shape") is not None:
        return None
    ones, pads = (1,) * spatial, tuple(view.attribute("pads", (0,) * (2 * spatial)))
    return Geometry(tuple(view.attribute("strides", ones)), tuple(view.attribute("dilations", ones)), pads[:spatial])


def read_gemm(view: View) -> Reading | str | None:
    """``alpha x W + beta c``, W stored as (in, out) or (out, in)."""
    if view.attribute("transA", 0):
        return "it takes its input transposed (transA=1)"
    alpha, beta = float(view.attribute("alpha", 1.0)), float(view.attribute("beta", 1.0))
    weight = view.context.weight(view.input(1), alpha)
    if weight is None:
        return view.why_no_weight(1)
    if len(weight.shape) != 2:
        return None
    rows = bool(view.attribute("transB", 0))
    size = weight.shape[0 if rows else 1]
    bias = _gemm_bias(view, beta, size)
    if isinstance(bias, str):
        return bias
    layer = Layer("linear layer", "rows" if rows else "right", weight, bias, out_axis=1, in_axis=1)
    return Reading(layer, (view.input(0),), (0, 1), (0, 2))


def _gemm_bias(view: View, beta: float, size: int) -> Weight | str | None:
    if not view.input(2):
        return None
    if not view.is_constant(2):
        return view.why_no_weight(2)
    shape = view.context.constants.shape(view.input(2))
    if shape not in ((size,), (1, size), (1,), (1, 1), ()):
        return "its bias differs between rows"
    return view.context.weight(view.input(2), beta, size) or view.why_no_weight(2)


def read_matmul(view: View) -> Reading | str | None:
    """``x @ W`` or ``W @ x``; an Add of a vector behind ``x @ W`` is its bias."""
    right, left = view.context.weight(view.input(1)), view.context.weight(view.input(0))
    weight = right or left
    if weight is None:
        overridable = view.context.constants.overridable & set(view.node.input)
        return view.why_no_weight(0, 1) if overridable else None
    value = 0 if right is not None else 1
    before, rank = view.shape(value), view.rank
    if before is None or rank is None or len(before) != rank or not 2 <= len(weight.shape) <= rank:
        return "a product with a vector has no channel axis"
    axis = rank - 1 if right is not None else rank - 2
    layer = Layer(
        "matrix product", "right" if right is not None else "left", weight, None,
        out_axis=axis, in_axis=axis, takes_bias=False,
    )  # fmt: skip
    found = Reading(layer, (view.input(value),), (0, 1 - value), None)
    return _with_bias(view, layer, found) or found


def _with_bias(view: View, layer: Layer, found: Reading) -> Reading | None:
    """MatMul and Add together, where the Add is the product's only reader and adds one number per output channel."""
    add = view.context.followers.get(view.node.output[0])
    if add is None or add.op_type != "Add" or not is_default(add) or layer.layout != "right":
        return None
    slot = 1 - list(add.input).index(view.node.output[0])
    bias = view.context.weight(add.input[slot])
    if bias is None or bias.shape != (layer.weight.shape[-1],) or bias.dtype != layer.weight.dtype:
        return None
    return replace(
        found,
        kind=replace(layer, name="linear layer", bias=bias, takes_bias=True),
        bias=(1, slot),
        nodes=(add,),
    )
