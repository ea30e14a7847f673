"""Operators of onnx's reference implementation that are wrong or slow, in numpy, beside ``pooling``.

Checked against onnx 1.23: its BatchNormalization before operator set 14 takes batch statistics although it is not training,
its grouped ConvTranspose fails where groups do not divide the weight evenly, and its AveragePool loops over each output
position. A class is used only where all nodes of its kind are what it knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper
from onnx.reference.op_run import OpRun

from bnexport.runtimes.onnx_file import nodes
from bnexport.runtimes.pooling import fast_operators
from bnexport.tensors import Array


class BatchNormalization(OpRun):
    """Before operator set 14: by the given statistics, unless the statistics of the batch are asked for as outputs."""

    def _run(
        self, x: Array, scale: Array, bias: Array, mean: Array, var: Array, epsilon: float = 1e-5, **_rest: Any
    ) -> tuple[Array]:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        numbers = [item.reshape(shape) for item in (scale, bias, mean, var)]
        return (numbers[0] * (x - numbers[2]) / np.sqrt(numbers[3] + epsilon) + numbers[1],)


class ConvTranspose(OpRun):
    """Transposed convolution as a sum over the taps of the kernel; any groups, stride, dilation and padding."""

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        output_padding: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        **_rest: Any,
    ) -> tuple[Array]:
        spatial = x.ndim - 2
        ones, zeros = (1,) * spatial, (0,) * spatial
        steps, spread, more = strides or ones, dilations or ones, output_padding or zeros
        begin = tuple(pads)[:spatial] if pads else zeros
        end = tuple(pads)[spatial:] if pads else zeros
        kernel, groups = weight.shape[2:], group or 1
        sizes = [steps[i] * (x.shape[2 + i] - 1) + more[i] + (kernel[i] - 1) * spread[i] + 1 for i in range(spatial)]
        n, outputs = x.shape[0], weight.shape[1] * groups
        grouped = x.reshape(n, groups, -1, *x.shape[2:])
        taps = weight.reshape(groups, -1, weight.shape[1], *kernel)  # (groups, in / groups, out / groups, *kernel)
        total = np.zeros((n, outputs, *sizes), dtype=x.dtype)
        for tap in itertools.product(*map(range, kernel)):
            at: Any = (slice(None), slice(None), slice(None), *tap)
            part = np.einsum("ngi...,gio->ngo...", grouped, taps[at])
            places = tuple(
                slice(tap[i] * spread[i], tap[i] * spread[i] + steps[i] * (x.shape[2 + i] - 1) + 1, steps[i])
                for i in range(spatial)
            )
            total[(slice(None), slice(None), *places)] += part.reshape(n, outputs, *x.shape[2:])
        kept = tuple(slice(begin[i], sizes[i] - end[i]) for i in range(spatial))
        total = total[(slice(None), slice(None), *kept)]
        if bias is not None:
            total = total + bias.reshape(1, -1, *ones)
        return (total,)


class AveragePool(OpRun):
    """Average pooling with zero padding, counted or not."""

    def _run(
        self,
        x: Array,
        kernel_shape: Sequence[int] = (),
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        count_include_pad: int | None = None,
        **_rest: Any,
    ) -> tuple[Array]:
        total = _windows(x, kernel_shape, pads, strides, 0.0).sum(axis=_kernel_axes(kernel_shape))
        counted = np.ones((1, 1, *x.shape[2:]))
        number = _windows(counted, kernel_shape, pads, strides, float(count_include_pad or 0))
        return (total / number.sum(axis=_kernel_axes(kernel_shape)),)


def _kernel_axes(kernel: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(kernel), 0))


def _windows(
    x: Array, kernel: Sequence[int], pads: Sequence[int] | None, strides: Sequence[int] | None, fill: float
) -> Array:
    """(n, channels, *size) to (n, channels, *positions, *kernel)."""
    spatial = len(kernel)
    around = tuple(pads or (0,) * (2 * spatial))
    widths = [(0, 0), (0, 0), *((around[i], around[spatial + i]) for i in range(spatial))]
    padded = np.pad(x, widths, constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded, tuple(kernel), axis=tuple(range(2, 2 + spatial)))
    found: Array = windows[(slice(None), slice(None), *(slice(None, None, step) for step in strides or (1,) * spatial))]
    return found


def _values(node: NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _plain_window(node: NodeProto) -> bool:
    """No rounding up, no dilation, no padding by rule, one output."""
    values = _values(node)
    plain = all(step == 1 for step in values.get("dilations", ())) and not values.get("ceil_mode")
    return plain and values.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID") and _outputs(node) == 1


def _transposed(node: NodeProto) -> bool:
    values = _values(node)
    return values.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID") and "output_shape" not in values


def _outputs(node: NodeProto) -> int:
    return sum(bool(name) for name in node.output)


#: Operator -> (class, newest operator set it is needed for, which nodes it knows).
_TABLE: dict[str, tuple[Any, int, Callable[[NodeProto], bool]]] = {
    "BatchNormalization": (BatchNormalization, 13, lambda node: _outputs(node) == 1),
    "ConvTranspose": (ConvTranspose, 99, _transposed),
    "AveragePool": (AveragePool, 99, _plain_window),
}


def better_operators(model: ModelProto) -> list[Any] | None:
    """The classes that ``onnx.reference.ReferenceEvaluator`` should use for a model; None for none."""
    found = list(fast_operators(model) or ())
    there = {operator.__name__ for operator in found}
    by_kind: dict[str, list[NodeProto]] = {}
    for node in nodes(model):
        if node.op_type in _TABLE and node.domain in ("", "ai.onnx") and node.op_type not in there:
            by_kind.setdefault(node.op_type, []).append(node)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    for kind, group in by_kind.items():
        operator, newest, knows = _TABLE[kind]
        if opset <= newest and all(map(knows, group)):
            found.append(operator)
    return found or None
