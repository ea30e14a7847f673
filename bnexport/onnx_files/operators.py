"""Operators that onnx's reference implementation computes wrongly or slowly, in numpy.

Checked against onnx 1.23:

- Add, Sub, Mul and Div before operator set 7 broadcast by the attribute axis, which is not read.
- BatchNormalization before operator set 14 takes the statistics of the batch although it is not training.
- ConvTranspose with groups fails where the groups do not divide the weight evenly.
- AveragePool and MaxPool loop over each output position. Where windows are rounded up and there is padding, their number is
  wrong, and so is the mean: it divides by the whole kernel where the window hangs out of the padded input. torch, ONNX Runtime
  and the operator's text since opset 19 count the elements inside. Vectorised pooling makes the proof of a LeNet seven times
  faster, which allows seven times more images.

A class is used only where it can compute all nodes of its kind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper
from onnx.reference.op_run import OpRun

from bnexport.onnx_files.models import nodes
from bnexport.tensors import Array


class BatchNormalization(OpRun):
    """Normalises by the given statistics, before operator set 14 and without the statistics of the batch as outputs."""

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
    """Average pooling with explicit padding, counted or not."""

    def _run(self, x: Array, kernel_shape: Any = None, **options: Any) -> tuple[Array]:
        counted = bool(options.get("count_include_pad"))
        return (average_pool(x, tuple(kernel_shape), **_geometry(len(kernel_shape), options), counted=counted),)


class MaxPool(OpRun):
    """Max pooling with explicit padding, without the places of the maxima."""

    def _run(self, x: Array, kernel_shape: Any = None, **options: Any) -> tuple[Array]:
        return (max_pool(x, tuple(kernel_shape), **_geometry(len(kernel_shape), options)),)


class _OldArithmetic(OpRun):
    """Arithmetic before operator set 7: the second operand is aligned with the first from ``axis`` on."""

    compute: Any

    def _run(
        self, a: Array, b: Array, axis: int | None = None, broadcast: int | None = None, **_rest: Any
    ) -> tuple[Array]:
        if broadcast and axis is not None:
            b = b.reshape(b.shape + (1,) * (a.ndim - axis % a.ndim - b.ndim))
        return (type(self).compute(a, b),)


class Add(_OldArithmetic):
    """``a + b``."""

    compute = staticmethod(np.add)


class Sub(_OldArithmetic):
    """``a - b``."""

    compute = staticmethod(np.subtract)


class Mul(_OldArithmetic):
    """``a * b``."""

    compute = staticmethod(np.multiply)


class Div(_OldArithmetic):
    """``a / b``."""

    compute = staticmethod(lambda a, b: a / b if a.dtype.kind == "f" else a // b)


def _geometry(dims: int, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "strides": tuple(options.get("strides") or (1,) * dims),
        "pads": tuple(options.get("pads") or ()),
        "dilations": tuple(options.get("dilations") or ()),
        "ceil": bool(options.get("ceil_mode")),
    }


def average_pool(
    x: Array,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: tuple[int, ...] = (),
    dilations: tuple[int, ...] = (),
    *,
    ceil: bool = False,
    counted: bool = True,
) -> Array:
    """Return the mean over windows: (n, channels, *size) to (n, channels, *positions).

    ``kernel``, ``strides`` and ``dilations`` (empty: 1) have one number per axis; ``pads`` has all beginnings, then all ends.
    ``ceil`` rounds the number of windows up: what hangs out of the padded input is never counted. ``counted`` counts the
    padding's zeros.
    """
    total = _pooled(x, kernel, strides, pads, dilations, ceil=ceil, outside=0.0, reduce=np.sum)
    dims = len(kernel)
    pads, dilations = pads or (0,) * (2 * dims), dilations or (1,) * dims
    divisor = np.ones((1,) * x.ndim)
    for at in range(dims):
        taps = np.arange(total.shape[2 + at])[:, None] * strides[at] + np.arange(kernel[at]) * dilations[at] - pads[at]
        first, end = (-pads[at], x.shape[2 + at] + pads[dims + at]) if counted else (0, x.shape[2 + at])
        inside = ((taps >= first) & (taps < end)).sum(axis=1)  # (positions,)
        divisor = divisor * inside.reshape([-1 if axis == 2 + at else 1 for axis in range(x.ndim)])
    result: Array = total / divisor
    return result


def max_pool(
    x: Array,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: tuple[int, ...] = (),
    dilations: tuple[int, ...] = (),
    *,
    ceil: bool = False,
) -> Array:
    """Return the maximum over windows, never the padding: (n, channels, *size) to (n, channels, *positions)."""
    outside = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    return _pooled(x, kernel, strides, pads, dilations, ceil=ceil, outside=outside, reduce=np.max)


def _pooled(
    x: Array,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: tuple[int, ...],
    dilations: tuple[int, ...],
    *,
    ceil: bool,
    outside: float,
    reduce: Callable[..., Array],
) -> Array:
    dims = len(kernel)
    pads, dilations = pads or (0,) * (2 * dims), dilations or (1,) * dims
    spans = [step * (size - 1) + 1 for step, size in zip(dilations, kernel, strict=True)]
    borders, counts = [], []
    for at, (span, stride) in enumerate(zip(spans, strides, strict=True)):
        size, before, after = x.shape[2 + at], pads[at], pads[dims + at]
        count = positions(size, before, after, span, stride, ceil=ceil)
        counts.append(count)
        borders.append((before, max(after, (count - 1) * stride + span - size - before)))
    padded = np.pad(x, ((0, 0), (0, 0), *borders), constant_values=outside) if any(map(any, borders)) else x
    axes = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=axes)  # (n, channels, *starts, *span)
    starts = tuple(slice(None, count * stride, stride) for count, stride in zip(counts, strides, strict=True))
    inside = tuple(slice(None, None, step) for step in dilations)
    chosen = windows[(slice(None), slice(None), *starts, *inside)]
    result: Array = reduce(chosen, axis=tuple(range(-dims, 0)))
    return result


def positions(size: int, before: int, after: int, span: int, stride: int, *, ceil: bool) -> int:
    """Return the windows along one axis; rounding up adds one only if it starts inside the input or the padding before it."""
    room = size + before + after - span
    count = (math.ceil(room / stride) if ceil else room // stride) + 1
    return count - 1 if ceil and (count - 1) * stride >= size + before else count


def _values(node: NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _explicit(node: NodeProto) -> bool:
    """Return whether the padding is given in numbers."""
    return _values(node).get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")


def _one_output(node: NodeProto) -> bool:
    return sum(bool(name) for name in node.output) == 1


#: Operator -> (class, newest operator set that needs it, nodes that it can compute).
_TABLE: dict[str, tuple[Any, int, Callable[[NodeProto], bool]]] = {
    **{operator.__name__: (operator, 6, lambda _node: True) for operator in (Add, Sub, Mul, Div)},
    "BatchNormalization": (BatchNormalization, 13, _one_output),
    "ConvTranspose": (ConvTranspose, 99, lambda node: _explicit(node) and "output_shape" not in _values(node)),
    "AveragePool": (AveragePool, 99, _explicit),
    "MaxPool": (MaxPool, 99, lambda node: _explicit(node) and _one_output(node)),
}


def better_operators(model: ModelProto) -> list[Any] | None:
    """Return the classes that ``onnx.reference.ReferenceEvaluator`` should use for a model; None for none."""
    by_kind: dict[str, list[NodeProto]] = {}
    for node in nodes(model):
        if node.op_type in _TABLE and node.domain in ("", "ai.onnx"):
            by_kind.setdefault(node.op_type, []).append(node)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    found = []
    for kind, group in by_kind.items():
        operator, newest, knows = _TABLE[kind]
        if opset <= newest and all(map(knows, group)):
            found.append(operator)
    return found or None
