"""Operators that onnx's reference implementation computes wrongly or slowly, and an evaluator that needs less memory.

Checked against onnx 1.23:

- Add, Sub, Mul and Div before operator set 7 broadcast by the attribute axis, which is not read.
- BatchNormalization before operator set 14 takes the statistics of the batch although it is not training.
- ConvTranspose with groups fails where the groups do not divide the weight evenly, and loops over samples and channels.
- AveragePool and MaxPool loop over each output position. If the number of windows is rounded up and there is padding, this
  number is wrong, and so is the mean: it divides by the whole kernel for a window that is partly outside of the padded input.
  torch, ONNX Runtime and the operator's text since opset 19 count the elements inside.
- Conv unfolds by index arrays of the size of the unfolded input.
- Erf rounds to float32, whatever the type of its input.
- DequantizeLinear rounds to float32, and both it and QuantizeLinear lack the operator sets from 11 to 18.
- Relu and Sigmoid make several copies.

A class is used only where it can compute all nodes of its kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from bnexport.onnx_files import kernels
from bnexport.onnx_files.models import attributes, nodes, opset_of
from bnexport.tensors import Array


class BatchNormalization(OpRun):
    """Normalises by the given statistics, before operator set 14 too, and without the statistics of the batch as outputs."""

    def _run(
        self, x: Array, scale: Array, bias: Array, mean: Array, var: Array, epsilon: float = 1e-5, **_rest: Any
    ) -> tuple[Array]:
        shape = (-1,) + (1,) * (x.ndim - 2)
        y = x - mean.reshape(shape)
        y *= (scale / np.sqrt(var + epsilon)).reshape(shape)
        y += bias.reshape(shape)
        return (y,)


class Conv(OpRun):
    """Convolution of any rank, groups, stride, dilation and padding."""

    def _run(self, x: Array, weight: Array, bias: Array | None = None, **options: Any) -> tuple[Array]:
        axes = _axes(x, weight.shape[2:], options)
        return (kernels.convolution(x, weight, bias, axes, options.get("group") or 1),)


class ConvTranspose(OpRun):
    """Transposed convolution of any rank, groups, stride, dilation and padding in numbers."""

    def _run(self, x: Array, weight: Array, bias: Array | None = None, **options: Any) -> tuple[Array]:
        axes = _axes(x, weight.shape[2:], options)
        more = options.get("output_padding") or (0,) * len(axes)
        return (kernels.transposed_convolution(x, weight, bias, axes, more, options.get("group") or 1),)


class AveragePool(OpRun):
    """Average pooling, with padding counted or not."""

    def _run(self, x: Array, kernel_shape: Any = None, **options: Any) -> tuple[Array]:
        counted = bool(options.get("count_include_pad"))
        return (kernels.average_pool(x, _axes(x, kernel_shape, options), counted=counted),)


class MaxPool(OpRun):
    """Max pooling without the places of the maxima."""

    def _run(self, x: Array, kernel_shape: Any = None, **options: Any) -> tuple[Array]:
        return (kernels.max_pool(x, _axes(x, kernel_shape, options)),)


class _OldArithmetic(OpRun):
    """Arithmetic before operator set 7: the second operand is aligned with the first from ``axis`` on."""

    compute: Any

    def _run(
        self, a: Array, b: Array, axis: int | None = None, broadcast: int | None = None, **_rest: Any
    ) -> tuple[Array]:
        if broadcast and axis is not None:
            b = b.reshape(b.shape + (1,) * (a.ndim - axis % a.ndim - b.ndim))
        return (type(self).compute(a, b),)


#: Operator -> its class; onnx reads the operator from the name of the class.
_OLD_ARITHMETIC = {
    name: type(name, (_OldArithmetic,), {"compute": staticmethod(compute)})
    for name, compute in (
        ("Add", np.add),
        ("Sub", np.subtract),
        ("Mul", np.multiply),
        ("Div", lambda a, b: a / b if a.dtype.kind == "f" else a // b),
    )
}


class Relu(OpRun):
    """Maximum with 0."""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.maximum(x, 0),)


class Sigmoid(OpRun):
    """1 / (1 + exp(-x)); if the exponential overflows, 1 / infinity is the correct 0."""

    def _run(self, x: Array) -> tuple[Array]:
        y = np.asarray(np.negative(x))
        with np.errstate(over="ignore"):
            np.exp(y, out=y)
        y += 1
        return (np.reciprocal(y, out=y),)


class Erf(OpRun):
    """The error function by the C library, in the type of the input."""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.asarray(np.frompyfunc(math.erf, 1, 1)(x)).astype(x.dtype),)


class QuantizeLinear(OpRun):
    """Codes of a tensor, with one scale or one for each channel: ties go to even."""

    def _run(self, x: Array, step: Array, zero: Array | None = None, axis: int = 1, **_rest: Any) -> tuple[Array]:
        zeros = np.zeros(step.shape, np.uint8) if zero is None else zero
        ends = np.iinfo(zeros.dtype)
        codes = np.asarray(np.rint(x / _along(step, x.ndim, axis)))  # also of a single number
        codes += _along(zeros, x.ndim, axis)
        return (np.clip(codes, ends.min, ends.max, out=codes).astype(zeros.dtype),)


class DequantizeLinear(OpRun):
    """Values of codes, in the type of the scale."""

    def _run(self, codes: Array, step: Array, zero: Array | None = None, axis: int = 1, **_rest: Any) -> tuple[Array]:
        values = codes.astype(step.dtype)
        if zero is not None:
            values -= _along(zero, codes.ndim, axis)
        values *= _along(step, codes.ndim, axis)
        return (values,)


def _along(numbers: Array, rank: int, axis: int) -> Array:
    """Return one number per channel in the shape that broadcasts along an axis."""
    return numbers.reshape([-1 if place == axis % rank else 1 for place in range(rank)]) if numbers.ndim else numbers


def _axes(x: Array, kernel: Sequence[int], options: dict[str, Any]) -> tuple[kernels.WindowAxis, ...]:
    """Return the windows of a node from its attributes."""
    if x.ndim != len(kernel) + 2:
        raise ValueError(f"an input of {x.shape} does not fit a kernel of {tuple(kernel)}")
    return kernels.axes_of(
        x.shape[2:],
        tuple(kernel),
        strides=options.get("strides"),
        pads=options.get("pads"),
        dilations=options.get("dilations"),
        auto_pad=options.get("auto_pad") or "NOTSET",
        ceil=bool(options.get("ceil_mode")),
    )


def _padded(node: NodeProto) -> bool:
    """Return True if no negative padding cuts the input."""
    return all(number >= 0 for number in attributes(node).get("pads", ()))


def _transposes(node: NodeProto) -> bool:
    """Return True if a ConvTranspose has its padding, and not the size of its output, in numbers."""
    options = attributes(node)
    return (
        _padded(node) and options.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID") and "output_shape" not in options
    )


def _by_channel(node: NodeProto) -> bool:
    """Return True if codes have one scale, or one for each channel."""
    options = attributes(node)
    return not any(options.get(name) for name in ("block_size", "output_dtype", "precision"))


def _one_output(node: NodeProto) -> bool:
    return sum(bool(name) for name in node.output) == 1


#: Operator -> (class, newest operator set that needs it, nodes that it can compute).
_TABLE: dict[str, tuple[Any, int, Callable[[NodeProto], bool]]] = {
    **{name: (operator, 6, lambda _node: True) for name, operator in _OLD_ARITHMETIC.items()},
    "BatchNormalization": (
        BatchNormalization, 99, lambda node: _one_output(node) and not attributes(node).get("training_mode")
    ),
    "Conv": (Conv, 99, _padded),
    "ConvTranspose": (ConvTranspose, 99, _transposes),
    "AveragePool": (AveragePool, 99, _padded),
    "MaxPool": (MaxPool, 99, lambda node: _padded(node) and _one_output(node)),
    "Relu": (Relu, 99, _one_output),
    "Sigmoid": (Sigmoid, 99, _one_output),
    "Erf": (Erf, 99, _one_output),
    "QuantizeLinear": (QuantizeLinear, 99, _by_channel),
    "DequantizeLinear": (DequantizeLinear, 99, _by_channel),
}  # fmt: skip


def better_operators(model: ModelProto) -> list[Any] | None:
    """Return the classes that ``onnx.reference.ReferenceEvaluator`` should use for a model; None for none."""
    by_kind: dict[str, list[NodeProto]] = {}
    for node in nodes(model):
        if node.op_type in _TABLE and node.domain in ("", "ai.onnx"):
            by_kind.setdefault(node.op_type, []).append(node)
    opset, found = opset_of(model), []
    for kind, group in by_kind.items():
        operator, newest, supports = _TABLE[kind]
        plain = not any(item.ref_attr_name for node in group for item in node.attribute)
        if plain and opset <= newest and all(map(supports, group)):
            found.append(operator)
    return found or None


class Evaluator(ReferenceEvaluator):
    """onnx's reference evaluator, with a callback for each value; a run frees each value after its last use."""

    look: Callable[[str, Any], None] | None = None  # Called with the name and the value of each output of a node

    def run(
        self,
        output_names: Any,
        feed_inputs: dict[str, Any],
        attributes: dict[str, Any] | None = None,
        intermediate: bool = False,
        check_shape_annotations: bool | None = None,
        _bindings: Any = None,
    ) -> Any:
        """Run as onnx's evaluator does."""
        checks = {"check_shape_annotations": check_shape_annotations, "_bindings": _bindings}
        checks = {name: value for name, value in checks.items() if value is not None}
        if intermediate or checks or any(node.need_context() for node in self.rt_nodes_):  # inner graphs read any value
            found: Any = super().run(None, feed_inputs, attributes, intermediate=True, **checks)
            for name in (name for node in self.rt_nodes_ for name in node.output if name and self.look):
                self._show(name, found[name])
            return found if intermediate else [found[name] for name in output_names or self.output_names]
        if attributes is None and isinstance(self.proto_, FunctionProto):
            raise TypeError("a function needs its attributes")
        wanted = list(output_names or self.output_names)
        values: dict[str, Any] = {"": None, **self.rt_inits_, **feed_inputs}
        for node, last in zip(self.rt_nodes_, self._last_uses(wanted), strict=True):
            linked = {"linked_attributes": attributes} if node.has_linked_attribute and attributes else {}
            made = node.run(*(values[name] for name in node.input), **linked)
            for name, value in zip(node.output, made, strict=False):
                values[name] = value
                self._show(name, value)
            for name in last:
                values.pop(name, None)
        return [values[name] for name in wanted]

    def _show(self, name: str, value: Any) -> None:
        if self.look is not None and name:
            self.look(name, value)

    def _last_uses(self, wanted: Sequence[str]) -> list[list[str]]:
        """Return for each node the values that nothing reads after it."""
        last: dict[str, int] = {}
        for at, node in enumerate(self.rt_nodes_):
            last.update(dict.fromkeys((*node.input, *node.output), at))
        found: list[list[str]] = [[] for _ in self.rt_nodes_]
        for name, at in last.items():
            if name and name not in wanted:
                found[at].append(name)
        return found


def evaluator_of(model: ModelProto, weights: Mapping[str, Array]) -> Evaluator:
    """Return the evaluator of a model with better operators; ``weights`` are the main graph's initializers by name."""
    evaluator = Evaluator(model, new_ops=better_operators(model))
    evaluator.rt_inits_.update(weights)
    return evaluator
