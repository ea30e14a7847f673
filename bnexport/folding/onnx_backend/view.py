"""A node as its reader sees it: attributes, constants, shapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from onnx import NodeProto, helper
from torch import Tensor

from bnexport.folding.affine import Dim
from bnexport.folding.graph import Kind, NormCall, Weight
from bnexport.folding.onnx_backend.constants import Constants, Shapes
from bnexport.folding.onnx_backend.inventory import label
from bnexport.tensors import Array

#: Place of a tensor among the inputs of a value's nodes: (which node, which input).
Slot = tuple[int, int]

OVERRIDABLE = "its weights are inputs of the model with a default value, which a caller may replace"
NOT_AN_INPUT = "initializers that are not listed among the graph's inputs"


@dataclass(frozen=True)
class Reading:
    """What a node is.

    Attributes:
        kind: What it computes.
        inputs: Names of the values it reads.
        weight: Where a layer's weight is read.
        bias: Where its bias is read, or would be.
        nodes: Nodes that belong to it besides its own.
        call: Set for a BatchNormalization.
    """

    kind: Kind
    inputs: tuple[str, ...]
    weight: Slot | None = None
    bias: Slot | None = None
    nodes: tuple[NodeProto, ...] = ()
    call: NormCall | None = None


class Context:
    """What all nodes of a graph share.

    Args:
        opset: Version of the default operator set.
        shapes: Of the graph's values.
        constants: Of the graph.
        followers: Name of a value -> the only node that reads it, where there is only one and it is no output.
        readers: How often each name is read.
    """

    def __init__(
        self, opset: int, shapes: Shapes, constants: Constants, followers: dict[str, NodeProto], readers: Counter[str]
    ) -> None:
        self.opset = opset
        self.shapes = shapes
        self.constants = constants
        self.followers = followers
        self.readers = readers
        self._weights: dict[tuple[str, float, int | None], Weight] = {}

    def weight(self, name: str, factor: float = 1.0, size: int | None = None) -> Weight | None:
        """A constant as a layer's tensor; None when it is no constant of a floating type.

        Args:
            name: Of the constant.
            factor: The layer multiplies it by this (Gemm's alpha and beta).
            size: For a bias: spread over so many channels.
        """
        if not self.constants.known(name):
            return None
        dtype, root = self.constants.dtype(name), self.constants.root(name)
        if dtype is None or not dtype.is_floating_point:
            return None
        key = (root, factor, size)
        if key not in self._weights:
            shape = self.constants.shape(root) if size is None else (size,)
            self._weights[key] = Weight(
                root, shape, dtype, lambda: self._loaded(root, factor, size), self.constants.readers(root)
            )
        return self._weights[key]

    def _loaded(self, name: str, factor: float, size: int | None) -> Tensor:
        value = self.constants.tensor(name) * factor
        return value if size is None else value.reshape(-1).expand(size)


class View:
    """One node.

    Args:
        node: Of ONNX's own operators.
        context: Of its graph.
    """

    def __init__(self, node: NodeProto, context: Context) -> None:
        self.node = node
        self.context = context
        self.opset = context.opset
        self._attributes = {item.name: item for item in node.attribute}

    @property
    def name(self) -> str:
        """In sentences and in the account."""
        return label(self.node)

    def input(self, index: int) -> str:
        """Name of an input; "" where it is left out."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def attribute(self, name: str, default: Any = None) -> Any:
        """Value of an attribute; text as str."""
        if name not in self._attributes:
            return default
        value = helper.get_attribute_value(self._attributes[name])
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    def is_constant(self, index: int) -> bool:
        """Whether an input is there and constant."""
        return bool(self.input(index)) and self.context.constants.known(self.input(index))

    def constant(self, index: int) -> Array | None:
        """Numbers of a constant input."""
        return self.context.constants.value(self.input(index)) if self.is_constant(index) else None

    def integers(self, name: str, index: int | None = None) -> list[int] | None:
        """A list of whole numbers, given as an attribute in old operator sets and as a constant input in new ones."""
        if name in self._attributes:
            value = self.attribute(name)
            return [int(item) for item in value] if isinstance(value, (list, tuple)) else None
        found = None if index is None else self.constant(index)
        return None if found is None else [int(item) for item in found.reshape(-1)]

    def shape(self, index: int = 0) -> tuple[Dim, ...] | None:
        """Shape of an input."""
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
        """Element type of an input."""
        return self.context.shapes.dtype(self.input(index))

    @property
    def output_dtype(self) -> torch.dtype | None:
        """Element type of the first output."""
        return self.context.shapes.dtype(self.node.output[0])

    @property
    def is_floating(self) -> bool:
        """Whether the result is of a floating type."""
        dtype = self.output_dtype
        return dtype is not None and dtype.is_floating_point

    def uses_output(self, index: int) -> bool:
        """Whether anything reads an output beside the first."""
        return index < len(self.node.output) and self.context.readers[self.node.output[index]] > 0

    def outputs(self) -> list[str]:
        """Names of the outputs that are not left out."""
        return [name for name in self.node.output if name]

    def why_no_weight(self, *indices: int) -> str:
        """Why these inputs are no weights."""
        names = {self.input(index) for index in indices}
        return OVERRIDABLE if names & self.context.constants.overridable else "its weights are computed in the graph"
