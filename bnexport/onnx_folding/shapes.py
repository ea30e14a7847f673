"""Shape and element type of every value of a graph's own nodes.

onnx's inference is run with numbers in place of the sizes that vary, several times with different ones: it is complete for
numbers, where it gives up on most arithmetic with names. A size that is the same each time is fixed; one that varies as one
of the inputs' sizes, or as a product of two, is that expression; two that always agree are taken for the same size. Every fold
is proved afterwards, so a coincidence here could lose one and never make a wrong one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import onnx
import sympy  # type: ignore[import-untyped]
import torch
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

from bnexport.folding.affine import Dim
from bnexport.onnx_folding.element_types import TORCH

#: Numbers for a size that is the first of an input (the batch), and for any other (height, width): several halvings fit. The
#: two do not grow alike, so that neither is a multiple of the other.
_BATCHES = (2, 3, 5)
_SIZES = (64, 96, 128)
_STEP = 32
#: Constants of more elements tell no shape, so that their numbers need not be copied.
_SMALL = 4096


class Shapes:
    """Shapes and element types by name of the value.

    Args:
        model: Not changed.

    Attributes:
        sizes: The inputs' varying sizes -> the numbers that stood for them.
    """

    def __init__(self, model: ModelProto) -> None:
        skeleton = _skeleton(model)
        self.sizes = _varying(skeleton)
        self._named = _inferred(skeleton)
        rounds = len(_BATCHES) if self.sizes else 1
        self._numbers = [self._round(skeleton, index) for index in range(rounds)]
        self._expressions = _expressions(self.sizes)

    def _round(self, skeleton: ModelProto, index: int) -> dict[str, ValueInfoProto]:
        """Inference with numbers for sizes. What it can't tell but the file says of inner values helps it on."""
        sizes = {name: numbers[index] for name, numbers in self.sizes.items()}
        bound = _bound(skeleton, sizes)
        found = _inferred(bound)
        told = [value for name, value in self._named.items() if _numbers_of(found.get(name)) is None]
        told = [value for value in (_with_numbers(value, sizes) for value in told) if _numbers_of(value) is not None]
        if not told:
            return found
        bound.graph.value_info.extend(told)
        return _inferred(bound)

    def of(self, name: str) -> tuple[Dim, ...] | None:
        """Shape of a value; None when it is unknown."""
        each = [_numbers_of(found.get(name)) for found in self._numbers]
        if any(shape is None or len(shape) != len(each[0] or ()) for shape in each):
            return self._as_named(name)
        return tuple(self._dim(values) for values in zip(*(shape or () for shape in each), strict=True))

    def example(self, name: str) -> list[int] | None:
        """Shape of a value in one example, in which the sizes of all values agree; None when it is unknown."""
        found = _numbers_of(self._numbers[0].get(name))
        if found is None and (shape := self.of(name)) is not None and all(isinstance(size, int) for size in shape):
            return [int(size) for size in shape]
        return found

    def dtype(self, name: str) -> torch.dtype | None:
        """Element type of a value; None when it is unknown or none that folding knows."""
        value = self._numbers[0].get(name) or self._named.get(name)
        return None if value is None else TORCH.get(value.type.tensor_type.elem_type)

    def _dim(self, values: tuple[int, ...]) -> Dim:
        if len(set(values)) == 1:
            return values[0]
        for expression, numbers in self._expressions:
            ratios = {Fraction(value, number) for value, number in zip(values, numbers, strict=True)}
            if len(ratios) == 1:
                ratio = ratios.pop()
                return expression * sympy.Rational(ratio.numerator, ratio.denominator)
        return sympy.Symbol("size_" + "_".join(map(str, values)), integer=True, positive=True)

    def _as_named(self, name: str) -> tuple[Dim, ...] | None:
        """What the file itself says, where numbers in place of its names do not go through."""
        value = self._named.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        return tuple(
            int(dim.dim_value) if dim.HasField("dim_value") else _symbol(dim.dim_param or f"{name}[{axis}]")
            for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        )


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


def _expressions(sizes: Mapping[str, Sequence[int]]) -> list[tuple[sympy.Expr, list[int]]]:
    """Single sizes, then products of two, with the numbers that they had."""
    found: list[tuple[sympy.Expr, list[int]]] = [(_symbol(name), list(numbers)) for name, numbers in sizes.items()]
    for (left, first), (right, second) in itertools.combinations_with_replacement(list(found), 2):
        found.append((left * right, [a * b for a, b in zip(first, second, strict=True)]))
    return found


def _skeleton(model: ModelProto) -> ModelProto:
    """The model without the numbers of its large weights; sizes of inputs that have no name get one."""
    bare = ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    graph, source = bare.graph, model.graph
    graph.name = source.name
    graph.node.extend(source.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == attribute.TENSOR and math.prod(attribute.t.dims) > _SMALL:
                attribute.t.CopyFrom(_bare(attribute.t))
    for ours, theirs in ((graph.input, source.input), (graph.output, source.output)):
        ours.extend(theirs)
    graph.value_info.extend(source.value_info)
    graph.initializer.extend(
        tensor if math.prod(tensor.dims) <= _SMALL else _bare(tensor) for tensor in source.initializer
    )
    stored = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if value.name not in stored and not dim.HasField("dim_value") and not dim.dim_param:
                dim.dim_param = f"{value.name}[{axis}]"
    return bare


def _bare(tensor: TensorProto) -> TensorProto:
    return TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)


def _varying(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Names of sizes in the inputs -> the numbers for them, all different."""
    found: dict[str, tuple[int, ...]] = {}
    others = itertools.count()
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and dim.dim_param not in found:
                step = 0 if axis == 0 else next(others) * _STEP
                found[dim.dim_param] = tuple(number + step for number in (_SIZES if axis else _BATCHES))
    return found


def _bound(skeleton: ModelProto, sizes: Mapping[str, int]) -> ModelProto:
    """A copy whose inputs have numbers for sizes; what it declares of other values is left out."""
    copy = ModelProto()
    copy.CopyFrom(skeleton)
    graph: GraphProto = copy.graph
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    if sizes:
        del graph.value_info[:]
        for value in graph.output:
            if value.type.WhichOneof("value") == "tensor_type":
                value.type.tensor_type.ClearField("shape")
    return copy


def _with_numbers(value: ValueInfoProto, sizes: Mapping[str, int]) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    for dim in copy.type.tensor_type.shape.dim:
        if dim.dim_param in sizes:
            dim.dim_value = sizes[dim.dim_param]
    return copy


def _inferred(model: ModelProto) -> dict[str, ValueInfoProto]:
    infer: Callable[..., ModelProto] = onnx.shape_inference.infer_shapes
    try:
        graph = infer(model, strict_mode=False, data_prop=True).graph
    except Exception:  # of no common class; what is unknown is left alone
        graph = model.graph
    found = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    for tensor in graph.initializer:
        found[tensor.name] = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
    return found


def _numbers_of(value: ValueInfoProto | None) -> list[int] | None:
    if value is None or not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    if not all(dim.HasField("dim_value") and dim.dim_value >= 0 for dim in dims):
        return None
    return [int(dim.dim_value) for dim in dims]
