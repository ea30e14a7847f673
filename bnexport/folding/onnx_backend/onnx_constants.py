"""Shapes, element types and constants of a graph's values, found without running it on an input.

Shapes: onnx's inference runs several times, each time with other numbers in place of the sizes that vary. It is complete for
numbers, but fails on most arithmetic with names. Values that the graph computes from shapes (the target of a Reshape) are
evaluated in between, since inference supports few of their operators. A size that is the same each time is fixed. A size that
varies as one of the inputs' sizes, or as a product of two, is that expression. Two sizes that always agree are treated as one
size. Every fold is proved afterwards, so a coincidence can lose a fold, but can't make a wrong one.

Constants: initializers, Constant nodes, and everything that is computed from them alone.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from fractions import Fraction
from typing import Any

import numpy as np
import sympy  # type: ignore[import-untyped]
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from bnexport.folding.affine import Dim
from bnexport.folding.onnx_backend.inventory import TORCH, is_default, widened
from bnexport.onnx_files.float64 import wide_evaluator
from bnexport.onnx_files.models import inferred_graph, mentions, refill, subgraphs, without_weights
from bnexport.tensors import Array

#: Operators that read a tensor's shape and not its elements; a fold changes no shape.
SHAPE_ONLY = ("Shape", "Size")
#: Operators without a fixed result.
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
#: Numbers for the first size of an input (the batch) and for its other sizes (height, width), which can be halved several
#: times. The two series grow differently, so that neither is a multiple of the other.
_BATCHES = (2, 3, 5)
_SIZES = (64, 96, 128)
_STEP = 32
#: Largest constant whose numbers are copied for inference: a longer one does not state a shape.
_SMALL = 4096
#: Largest value computed from shapes, and number of evaluations in a row: each may find the shapes that the next one reads.
_MAX_TARGET = 64
_MAX_EVALUATIONS = 8


class Shapes:
    """Shapes and element types by name of the value; the model is not changed.

    ``given`` maps inputs to the sizes of one sample, for sizes that the file leaves open. If inference fails with all other
    numbers, these sizes are treated as fixed. ``sizes`` maps the inputs' varying sizes to the numbers in their place.
    """

    def __init__(self, model: ModelProto, given: Mapping[str, Sequence[int]] | None = None) -> None:
        skeleton = _skeleton(model)
        self.sizes = _varying(skeleton, given or {})
        self._named = _inferred(skeleton)
        rounds = len(_BATCHES) if self.sizes else 1
        self._numbers = [self._round(skeleton, index) for index in range(rounds)]
        self._as_given = self._round(skeleton, 0, batch=1) if given and self.sizes else {}
        self._expressions = _expressions(self.sizes)

    def _round(self, skeleton: ModelProto, index: int, batch: int | None = None) -> dict[str, ValueInfoProto]:
        """Infer with numbers for sizes; add the file's declared shapes of inner values that inference does not find."""
        at = {name: index if batch is None or numbers != _BATCHES else batch for name, numbers in self.sizes.items()}
        sizes = {name: numbers[at[name]] for name, numbers in self.sizes.items()}
        bound = _bound(skeleton, sizes)
        found = _evaluated(bound)
        stated = [deepcopy(value) for name, value in self._named.items() if _numbers_of(found.get(name)) is None]
        for value in stated:
            _put_numbers(value, sizes)
        stated = [value for value in stated if _numbers_of(value) is not None]
        bound.graph.value_info.extend(stated)
        return _evaluated(bound) if stated else found

    def of(self, name: str) -> tuple[Dim, ...] | None:
        """Return the shape of a value; None if it is unknown."""
        each = [_numbers_of(found.get(name)) for found in self._numbers]
        if any(shape is None or len(shape) != len(each[0] or ()) for shape in each):
            named = self._as_named(name)
            return self._with_given(name) if named is None else named
        return tuple(self._dim(values) for values in zip(*(shape or () for shape in each), strict=True))

    def example(self, name: str) -> list[int] | None:
        """Return the shape of a value in one example, with consistent sizes of all values; None if it is unknown."""
        found = _numbers_of(self._numbers[0].get(name))
        if found is None and (shape := self.of(name)) is not None and all(isinstance(size, int) for size in shape):
            return [int(size) for size in shape]
        return found

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the element type of a value; None if it is unknown or folding does not support it."""
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

    def _with_given(self, name: str) -> tuple[Dim, ...] | None:
        """Return the shape for the given sizes if inference fails for all others; the batch still varies."""
        first, second = _numbers_of(self._numbers[0].get(name)), _numbers_of(self._as_given.get(name))
        if first is None or second is None or len(first) != len(second):
            return None
        return tuple(a if a == b else _symbol(f"size_{a}_{b}") for a, b in zip(first, second, strict=True))

    def _as_named(self, name: str) -> tuple[Dim, ...] | None:
        """Return the shape that the file declares, for a value whose inference with numbers fails."""
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
    """Return single sizes, then products of two, with their numbers."""
    found: list[tuple[sympy.Expr, list[int]]] = [(_symbol(name), list(numbers)) for name, numbers in sizes.items()]
    for (left, first), (right, second) in itertools.combinations_with_replacement(list(found), 2):
        found.append((left * right, [a * b for a, b in zip(first, second, strict=True)]))
    return found


def _skeleton(model: ModelProto) -> ModelProto:
    """Return the model without the numbers of its large weights, and with names for all open sizes of inputs."""
    bare = without_weights(model)
    graph = bare.graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == attribute.TENSOR and math.prod(attribute.t.dims) > _SMALL:
                attribute.t.CopyFrom(_bare(attribute.t))
    for tensor in model.graph.initializer:
        graph.initializer.append(tensor if math.prod(tensor.dims) <= _SMALL else _bare(tensor))
    stored = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if value.name not in stored and not dim.HasField("dim_value") and not dim.dim_param:
                dim.dim_param = f"{value.name}[{axis}]"
    return bare


def _bare(tensor: TensorProto) -> TensorProto:
    return TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)


def _varying(model: ModelProto, given: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the names of the inputs' sizes with their numbers, all different; given numbers come first."""
    found: dict[str, tuple[int, ...]] = {}
    numbers: tuple[int, ...]
    others = itertools.count()
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and dim.dim_param not in found:
                step = 0 if axis == 0 else next(others) * _STEP
                numbers = _SIZES if axis else _BATCHES
                sample = given.get(value.name, ())
                if 0 < axis <= len(sample):
                    step, numbers = 0, tuple(sample[axis - 1] + number - _SIZES[0] for number in _SIZES)
                found[dim.dim_param] = tuple(number + step for number in numbers)
    return found


def _bound(skeleton: ModelProto, sizes: Mapping[str, int]) -> ModelProto:
    """Return a copy whose inputs have numbers for sizes, without declared shapes of other values."""
    copy = deepcopy(skeleton)
    graph: GraphProto = copy.graph
    for value in graph.input:
        _put_numbers(value, sizes)
    if sizes:
        del graph.value_info[:]
        for value in graph.output:
            if value.type.WhichOneof("value") == "tensor_type":
                value.type.tensor_type.ClearField("shape")
    return copy


def _put_numbers(value: ValueInfoProto, sizes: Mapping[str, int]) -> None:
    for dim in value.type.tensor_type.shape.dim:
        if dim.dim_param in sizes:
            dim.dim_value = sizes[dim.dim_param]


def _inferred(model: ModelProto) -> dict[str, ValueInfoProto]:
    graph = inferred_graph(model)
    found = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    for tensor in graph.initializer:
        found[tensor.name] = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
    return found


def _evaluated(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Infer the shapes of a model whose inputs have numbers for sizes; values computed from shapes become initializers."""
    small = [tensor for tensor in model.graph.initializer if math.prod(tensor.dims) <= _MAX_TARGET]
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in small if tensor.data_type in TORCH}
    found = _inferred(model)
    if not any(node.op_type in SHAPE_ONLY for node in model.graph.node):
        return found
    sized: set[str] = set()
    for _ in range(_MAX_EVALUATIONS):
        fresh = {}
        for node in model.graph.node:
            if node.output[0] in known or (value := _value_of(node, known, found, model)) is None:
                continue
            known[node.output[0]] = value
            if node.op_type in SHAPE_ONLY or sized & set(node.input):
                sized.add(node.output[0])
                fresh[node.output[0]] = value
        if not fresh:
            break
        refill(model.graph.node, [node for node in model.graph.node if not (node.output and node.output[0] in fresh)])
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in fresh.items())
        found = _inferred(model)
    return found


def _value_of(
    node: NodeProto, known: Mapping[str, Array], found: Mapping[str, ValueInfoProto], model: ModelProto
) -> Array | None:
    """Return the short result of a node that reads shapes, or values computed from shapes; None for other nodes."""
    if not is_default(node) or len(node.output) != 1 or subgraphs(node) or node.op_type in _RANDOM:
        return None
    feeds = {}
    for name in filter(None, node.input):
        shape = _numbers_of(found.get(name)) if node.op_type in SHAPE_ONLY else None
        if shape is None and name not in known:
            return None
        feeds[name] = known[name] if shape is None else np.broadcast_to(np.float64(0), shape)
    try:
        (value,) = node_evaluator([node], model, list(feeds), node.output[0]).run(None, feeds)
    except Exception:  # of no common class; unknown values are left alone
        return None
    array, declared = np.asarray(value), found.get(node.output[0])
    if array.size > _MAX_TARGET or array.dtype.kind not in "fiub":
        return None
    if declared is not None and declared.type.tensor_type.elem_type in TORCH:
        array = array.astype(helper.tensor_dtype_to_np_dtype(declared.type.tensor_type.elem_type))
    return array


def _numbers_of(value: ValueInfoProto | None) -> list[int] | None:
    if value is None or not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    if not all(dim.HasField("dim_value") and dim.dim_value >= 0 for dim in dims):
        return None
    return [int(dim.dim_value) for dim in dims]


#: Operators that are computed ahead if all their inputs are constant.
_COMPUTED = {
    *("Abs", "Add", "Cast", "CastLike", "Concat", "ConstantOfShape", "Div", "Exp", "Expand", "Flatten", "Gather"),
    *("Identity", "Mul", "Neg", "Pow", "Reciprocal", "ReduceL2", "ReduceSum", "Reshape", "Shape", "Slice", "Sqrt"),
    *("Squeeze", "Sub", "Transpose", "Unsqueeze"),
}
_MAX_ELEMENTS = 1 << 26
_MAX_RANK = 16


class OnnxConstants:
    """The constants of a model's main graph, in float64; the model is not changed."""

    def __init__(self, model: ModelProto, shapes: Shapes) -> None:
        self._model, self._shapes = model, shapes
        inputs = {value.name for value in model.graph.input}
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        # Initializers that are also inputs, so that a caller may replace them. Before IR version 4 every initializer had to be
        # listed as an input; engines treat it as a constant.
        self.overridable = inputs & set(stored) if model.ir_version >= 4 else set()
        self._stored = {name: tensor for name, tensor in stored.items() if name not in self.overridable}
        self._nodes: dict[str, NodeProto] = {}
        self._values: dict[str, Array] = {}
        self._counts: Counter[str] = mentions(model.graph)
        for node in model.graph.node:
            if node.op_type in SHAPE_ONLY:  # a folded weight has the same shape
                self._counts.subtract(node.input)
        self._readers: dict[str, int] = {}
        self._root: dict[str, str] = {}
        self._functions = {(function.domain, function.name) for function in model.functions}
        for node in model.graph.node:
            if self._is_constant(node):
                self._nodes[node.output[0]] = node
        self._count_aliases()

    def is_plain(self, node: NodeProto) -> bool:
        """Return True for an operator of ONNX's default domain that no function of the file replaces."""
        return is_default(node) and (node.domain, node.op_type) not in self._functions

    def known(self, name: str) -> bool:
        """Return True if a name is that of a constant."""
        return name in self._stored or name in self._nodes

    def computes(self, node: NodeProto) -> bool:
        """Return True if a node computes a constant."""
        return bool(node.output) and node.output[0] in self._nodes

    def root(self, name: str) -> str:
        """Return the name of a constant before all Identity nodes."""
        return self._root.get(name, name)

    def readers(self, name: str) -> int:
        """Count the readers of a constant, under any of its names, and of the constants from which it is computed."""
        return self._readers.get(self.root(name), self._counts[self.root(name)])

    def computed_from(self, name: str) -> int:
        """Count the elements that are stored for a constant: its own, or those from which it is computed."""
        sources, stack = set(), [name]
        while stack:
            top = stack.pop()
            node = self._nodes.get(top)
            if node is None or node.op_type == "Constant":
                sources.add(top)
            else:
                stack += self._read_by(node)
        return sum(self._size(item) for item in sources if self._is_float(item))

    def uses(self, name: str) -> int:
        """Count the readers of the constant itself, under any of its names."""
        return self._aliased[self.root(name)]

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the stored element type of a constant."""
        tensor = self._stored.get(self.root(name))
        return TORCH.get(tensor.data_type) if tensor is not None else self._shapes.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a constant."""
        tensor = self._stored.get(self.root(name))
        return tuple(tensor.dims) if tensor is not None else tuple(self.value(name).shape)

    def value(self, name: str) -> Array:
        """Return the numbers of a constant: floats in float64, other types unchanged."""
        stack = [name]
        while stack:
            top = stack[-1]
            if top in self._values:
                stack.pop()
                continue
            node = self._nodes.get(top)
            if node is None:
                self._values[top] = widened(self._stored[top])
            elif missing := [item for item in self._read_by(node) if item not in self._values]:
                stack += missing
            else:
                self._values[top] = self._computed(node)
        return self._values[name]

    def tensor(self, name: str) -> Tensor:
        """Return the numbers of a constant as a float64 tensor."""
        return torch.from_numpy(np.array(self.value(name), dtype=np.float64))

    @property
    def elements(self) -> int:
        """Count the elements of all initializers and Constant nodes."""
        inner = (self._shapes.example(name) or [] for name, node in self._nodes.items() if node.op_type == "Constant")
        return int(sum(math.prod(item.dims) for item in self._model.graph.initializer) + sum(map(math.prod, inner)))

    def _is_constant(self, node: NodeProto) -> bool:
        if len(node.output) != 1 or not self.is_plain(node):
            return False
        if node.op_type == "Constant":
            return not any(item.name in ("sparse_value", "value_string", "value_strings") for item in node.attribute)
        read = self._read_by(node)
        if node.op_type not in _COMPUTED or not read or not all(map(self.known, read)):
            return False
        return self._elements_of(node) <= _MAX_ELEMENTS

    def _read_by(self, node: NodeProto) -> list[str]:
        """Return the names that a node computes with; CastLike reads only the type of its second input."""
        return [name for name in node.input[: 1 if node.op_type == "CastLike" else None] if name]

    def _elements_of(self, node: NodeProto) -> int:
        """Return an upper bound on the elements of a computed constant; without a declared shape, from its sources."""
        if (shape := self._shapes.example(node.output[0])) is not None:
            return math.prod(shape)
        if node.op_type in ("Expand", "ConstantOfShape"):
            target = self.value(node.input[-1]).reshape(-1)[:_MAX_RANK]
            return math.prod(max(int(size), 0) for size in target) * self._size(node.input[0])
        return math.prod(map(self._size, self._read_by(node)))

    def _size(self, name: str) -> int:
        tensor, node = self._stored.get(name), self._nodes.get(name)
        if tensor is not None or node is None:
            return math.prod(tensor.dims) if tensor is not None else 1
        return max(self._elements_of(node), 1) if node.op_type != "Constant" else max(self.value(name).size, 1)

    def _count_aliases(self) -> None:
        """Count readers of each constant. A second name is not a reader; the result of a shared constant is shared too."""
        for name, node in self._nodes.items():
            if node.op_type == "Identity":
                self._root[name] = self.root(node.input[0])
        self._aliased: Counter[str] = Counter()
        for name in (*self._stored, *self._nodes):
            self._aliased[self.root(name)] += self._counts[name]
        for name in self._root:
            self._aliased[self.root(name)] -= 1
        for name in self._stored:
            self._readers[name] = max(self._readers.get(name, 0), self._aliased[name])
        for name, node in self._nodes.items():
            above = [self.readers(item) for item in self._read_by(node) if self._is_weight(item)]
            root = self.root(name)
            self._readers[root] = max(self._readers.get(root, 0), self._aliased[root], *above, 0)

    def _is_float(self, name: str) -> bool:
        dtype = self.dtype(name)
        return dtype is not None and dtype.is_floating_point

    def _is_weight(self, name: str) -> bool:
        """Return True if a constant is more than a shape, an axis or a single number."""
        shape = self._shapes.example(name)
        return self._is_float(name) and (shape is None or math.prod(shape) > 1)

    def _computed(self, node: NodeProto) -> Array:
        read = self._read_by(node)
        if node.op_type == "CastLike":
            return self._values[read[0]].astype(self._wide(node.output[0]))
        evaluator = node_evaluator([node], self._model, read, node.output[0])
        (found,) = evaluator.run(None, {name: self._values[name] for name in read})
        return np.asarray(found)

    def _wide(self, name: str) -> Any:
        dtype = self._shapes.dtype(name)
        return np.float64 if dtype is None or dtype.is_floating_point else torch.empty(0, dtype=dtype).numpy().dtype


def node_evaluator(nodes: list[NodeProto], model: ModelProto, inputs: list[str], output: str) -> Any:
    """Return the reference evaluator of a few nodes, with every float widened to float64."""
    values = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in dict.fromkeys(inputs)]
    result = helper.make_tensor_value_info(output, TensorProto.DOUBLE, None)
    graph = helper.make_graph(nodes, "part", values, [result])
    part = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    return wide_evaluator(part)
