"""What in a graph does not depend on its inputs: initializers, Constant nodes, and what is computed from them alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from bnexport.exporting.onnx_names import mentions
from bnexport.onnx_files.float64 import widen
from bnexport.onnx_files.operators import better_operators
from bnexport.onnx_folding.element_types import TORCH, widened
from bnexport.onnx_folding.inventory import is_default
from bnexport.onnx_folding.shapes import Shapes
from bnexport.tensors import Array

#: Operators that are computed ahead when all they read is constant.
_COMPUTED = frozenset(
    (
        *("Abs", "Add", "Cast", "CastLike", "Concat", "ConstantOfShape", "Div", "Exp", "Expand", "Flatten", "Gather"),
        *("Identity", "Mul", "Neg", "Pow", "Reciprocal", "ReduceL2", "ReduceSum", "Reshape", "Shape", "Slice", "Sqrt"),
        *("Squeeze", "Sub", "Transpose", "Unsqueeze"),
    )
)
#: Operators that look at a tensor's shape, never at its elements: a fold changes no shape.
SHAPE_ONLY = ("Shape", "Size")
_MAX_ELEMENTS = 1 << 26
_MAX_RANK = 16


class Constants:
    """The constants of a model's main graph, in float64.

    Args:
        model: Not changed.
        shapes: Of its values.

    Attributes:
        overridable: Initializers that are inputs too: a caller may give other numbers for them.
    """

    def __init__(self, model: ModelProto, shapes: Shapes) -> None:
        self._model, self._shapes = model, shapes
        inputs = {value.name for value in model.graph.input}
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        # Before IR version 4 every initializer had to be listed as an input; engines take it for a constant.
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

    def known(self, name: str) -> bool:
        """Whether a name stands for a constant."""
        return name in self._stored or name in self._nodes

    def computes(self, node: NodeProto) -> bool:
        """Whether a node gives a constant."""
        return bool(node.output) and node.output[0] in self._nodes

    def root(self, name: str) -> str:
        """The constant that a name is another name of, by Identity nodes."""
        return self._root.get(name, name)

    def readers(self, name: str) -> int:
        """How many read a constant, under any of its names, or something that it is computed from."""
        return self._readers.get(self.root(name), self._counts[self.root(name)])

    def uses(self, name: str) -> int:
        """How many read a constant itself, under any of its names."""
        return self._aliased[self.root(name)]

    def dtype(self, name: str) -> torch.dtype | None:
        """Element type that a constant is stored in."""
        tensor = self._stored.get(self.root(name))
        return TORCH.get(tensor.data_type) if tensor is not None else self._shapes.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a constant."""
        tensor = self._stored.get(self.root(name))
        return tuple(tensor.dims) if tensor is not None else tuple(self.value(name).shape)

    def value(self, name: str) -> Array:
        """Numbers of a constant: floats in float64, anything else as it is."""
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
        """Numbers of a constant as a float64 tensor."""
        return torch.from_numpy(np.array(self.value(name), dtype=np.float64))

    @property
    def elements(self) -> int:
        """Elements of all initializers and Constant nodes."""
        inner = (self._shapes.example(name) or [] for name, node in self._nodes.items() if node.op_type == "Constant")
        return int(sum(math.prod(item.dims) for item in self._model.graph.initializer) + sum(map(math.prod, inner)))

    def _is_constant(self, node: NodeProto) -> bool:
        if not is_default(node) or len(node.output) != 1 or (node.domain, node.op_type) in self._functions:
            return False
        if node.op_type == "Constant":
            return not any(item.name in ("sparse_value", "value_string", "value_strings") for item in node.attribute)
        read = self._read_by(node)
        if node.op_type not in _COMPUTED or not read or not all(map(self.known, read)):
            return False
        return self._elements_of(node) <= _MAX_ELEMENTS

    def _read_by(self, node: NodeProto) -> list[str]:
        """Names of what a node computes with; CastLike looks at the type of its second input alone."""
        return [name for name in node.input[: 1 if node.op_type == "CastLike" else None] if name]

    def _elements_of(self, node: NodeProto) -> int:
        """At most so many elements does a computed constant have; where the file does not tell, by what it is made from."""
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
        """Readers of each constant: a second name is no reader, and what is computed from a shared one is shared too."""
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

    def _is_weight(self, name: str) -> bool:
        """Whether a constant is more than a shape, an axis or a single number."""
        dtype, shape = self.dtype(name), self._shapes.example(name)
        return dtype is not None and dtype.is_floating_point and (shape is None or math.prod(shape) > 1)

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
    """The reference evaluator of a few nodes alone, every float widened to float64."""
    double = TensorProto.DOUBLE
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info(name, double, None) for name in dict.fromkeys(inputs)],
        [helper.make_tensor_value_info(output, double, None)],
    )
    part = onnx.helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    return ReferenceEvaluator(widen(part), new_ops=better_operators(part))
