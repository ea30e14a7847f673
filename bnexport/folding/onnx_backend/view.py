"""One node with its attributes, constants and shapes, and the result of reading it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import NodeProto, helper
from torch import Tensor

from bnexport.folding.affine import Dim
from bnexport.folding.graph import Kind, NormCall, Weight
from bnexport.folding.onnx_backend.inventory import label
from bnexport.folding.onnx_backend.onnx_constants import OnnxConstants, Shapes
from bnexport.tensors import Array

#: Place of a tensor among the inputs of a value's nodes: (which node, which input).
Slot = tuple[int, int]

OVERRIDABLE = "its weights are inputs of the model with a default value, which a caller may replace"


@dataclass(frozen=True)
class OnnxReading:
    """The result of reading a node: its kind, the names of the values it reads, and the places of weight and bias.

    ``nodes`` are further nodes of the same operation. ``call`` is set for a BatchNormalization.
    """

    kind: Kind
    inputs: tuple[str, ...]
    weight: Slot | None = None
    bias: Slot | None = None
    nodes: tuple[NodeProto, ...] = ()
    call: NormCall | None = None


@dataclass
class GraphContext:
    """The shared facts of a graph's nodes.

    ``followers`` maps a value to its only reader, for a value with one reader that is not an output. ``readers`` counts the
    readers of each name.
    """

    opset: int
    shapes: Shapes
    constants: OnnxConstants
    followers: dict[str, NodeProto]
    readers: Counter[str]
    inputs: frozenset[str] = frozenset()
    _weights: dict[tuple[str, float, int | None], Weight] = field(default_factory=dict, init=False)

    def weight(self, name: str, factor: float = 1.0, size: int | None = None) -> Weight | None:
        """Return a constant as a layer's tensor; None if it is not a constant of a floating type.

        ``factor`` is that of Gemm (alpha, beta); ``size`` is the number of channels over which a bias is spread.
        """
        if not self.constants.known(name):
            return None
        dtype, root = self.constants.dtype(name), self.constants.root(name)
        if dtype is None or not dtype.is_floating_point:
            return None
        key = (root, factor, size)
        if key not in self._weights:
            shape = self.constants.shape(root) if size is None else (size,)
            made = 0 if size is not None else max(math.prod(shape) - self.constants.computed_from(root), 0)
            self._weights[key] = Weight(
                root, shape, dtype, lambda: self._loaded(root, factor, size), self.constants.readers(root), made
            )
        return self._weights[key]

    def _loaded(self, name: str, factor: float, size: int | None) -> Tensor:
        value = self.constants.tensor(name) * factor
        return value if size is None else value.reshape(-1).expand(size)


class NodeView:
    """One node of ONNX's default domain in its context."""

    def __init__(self, node: NodeProto, context: GraphContext) -> None:
        self.node = node
        self.context = context
        self.opset = context.opset
        self._attributes = {item.name: item for item in node.attribute}

    @property
    def name(self) -> str:
        """The name in messages and in the report."""
        return label(self.node)

    def input(self, index: int) -> str:
        """Return the name of an input; "" if it is left out."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute; text as str."""
        if name not in self._attributes:
            return default
        value = helper.get_attribute_value(self._attributes[name])
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    def is_constant(self, index: int) -> bool:
        """Return True if an input is given and constant."""
        return bool(self.input(index)) and self.context.constants.known(self.input(index))

    def constant(self, index: int) -> Array | None:
        """Return the numbers of a constant input."""
        return self.context.constants.value(self.input(index)) if self.is_constant(index) else None

    def integers(self, name: str, index: int | None = None) -> list[int] | None:
        """Return whole numbers: an attribute in old operator sets, a constant input in new ones."""
        if name in self._attributes:
            value = self.attribute(name)
            return [int(item) for item in value] if isinstance(value, (list, tuple)) else None
        found = None if index is None else self.constant(index)
        return None if found is None else [int(item) for item in found.reshape(-1)]

    def shape(self, index: int = 0) -> tuple[Dim, ...] | None:
        """Return the shape of an input."""
        return self.context.shapes.of(self.input(index)) if self.input(index) else None

    @property
    def output_shape(self) -> tuple[Dim, ...] | None:
        """Shape of the first output."""
        return self.context.shapes.of(self.node.output[0])

    @property
    def rank(self) -> int | None:
        """Axes of the first output."""
        shape = self.output_shape
        return None if shape is None else len(shape)

    def dtype(self, index: int = 0) -> torch.dtype | None:
        """Return the element type of an input."""
        return self.context.shapes.dtype(self.input(index))

    @property
    def output_dtype(self) -> torch.dtype | None:
        """Element type of the first output."""
        return self.context.shapes.dtype(self.node.output[0])

    @property
    def is_floating(self) -> bool:
        """True if the result is of a floating type."""
        dtype = self.output_dtype
        return dtype is not None and dtype.is_floating_point

    def uses_output(self, index: int) -> bool:
        """Return True if an output other than the first has a reader."""
        return index < len(self.node.output) and self.context.readers[self.node.output[index]] > 0

    def why_not_constant(self, *indices: int, noun: str = "weights") -> str:
        """Return the reason why these inputs are not constants."""
        names = {self.input(index) for index in indices}
        if names & self.context.constants.overridable:
            return OVERRIDABLE.replace("weights", noun)
        variable = {name for name in names if name and not self.context.constants.known(name)}
        if variable & self.context.inputs:
            return f"its {noun} are inputs of the model"
        return f"its {noun} are computed in the graph"
