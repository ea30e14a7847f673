"""The backend for ONNX files: the main graph read into values, evaluated in float64 by onnx's reference implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, ValueInfoProto
from torch import Tensor

from bnexport.folding.graph import Identity, Kind, Layer, NormCall, Op, Opaque, Reshape, connect
from bnexport.folding.layers import channels_of
from bnexport.folding.onnx_backend.inventory import is_batch_norm, label
from bnexport.folding.onnx_backend.onnx_constants import SHAPE_ONLY, OnnxConstants, Shapes, node_evaluator
from bnexport.folding.onnx_backend.onnx_norms import unread_batch_norm
from bnexport.folding.onnx_backend.onnx_readers import ONNX_READERS, read_piece, read_split
from bnexport.folding.onnx_backend.view import OVERRIDABLE, GraphContext, NodeView, OnnxReading, Slot
from bnexport.folding.torch_backend.torch_graph import evaluate_kind
from bnexport.onnx_files.models import opset_of, refill
from bnexport.onnx_files.names import mentions, reads
from bnexport.tensors import Array

#: Exceptions of a reader if a file's attributes contradict each other.
_CONTRADICTIONS = (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError, AttributeError)
_WEIGHT, _BIAS = "folded weight", "folded bias"


@dataclass
class OnnxSource:
    """The origin of a value: the nodes that compute it in order, and the names of the values that are ``Op.inputs``.

    ``weight`` and ``bias`` are the places of a layer's tensors, the bias used or not. ``evaluators`` has the evaluator with fed
    weight and bias (True) and the one with the file's tensors (False).
    """

    nodes: tuple[NodeProto, ...]
    output: str
    reads: tuple[str, ...]
    weight: Slot | None = None
    bias: Slot | None = None
    evaluators: dict[bool, Any] = field(default_factory=dict)


class OnnxGraph:
    """The main graph of a valid model as ``folding.graph.Graph``; the model is not changed.

    ``given`` has numbers for open sizes, by input (see ``Shapes``).
    """

    def __init__(self, model: ModelProto, given: Mapping[str, Sequence[int]] | None = None) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.opset = opset_of(model)
        self.shapes = Shapes(model, given)
        self.constants = OnnxConstants(model, self.shapes)
        self.ops: list[Op] = []
        self.by_name: dict[str, Op] = {}
        self._users: dict[str, list[NodeProto]] = {}
        self._context = self._make_context()
        self._taken: set[str] = set()
        self._sequences: dict[str, NodeProto] = {}
        for value in model.graph.input:
            self._add_input(value)
        for node in self.nodes:
            self._read(node)
        self._add_output()
        connect(self.ops)

    @property
    def elements(self) -> int:
        """Elements of all stored tensors."""
        return self.constants.elements

    # --- reading ---

    def _make_context(self) -> GraphContext:
        for node in self.nodes:
            for name in reads(node):
                self._users.setdefault(name, []).append(node)
        count = mentions(self.model.graph)
        followers = {
            name: users[0]
            for name, users in self._users.items()
            if len(users) == count[name] == 1 and self.constants.is_plain(users[0])
        }
        inputs = frozenset(value.name for value in self.model.graph.input)
        return GraphContext(self.opset, self.shapes, self.constants, followers, count, inputs)

    def _add_input(self, value: ValueInfoProto) -> None:
        if not self.constants.known(value.name):
            kind = Opaque(OVERRIDABLE) if value.name in self.constants.overridable else Opaque()
            self._add(kind, OnnxSource((), value.name, ()), f"the model's input {value.name!r}", "")

    def _read(self, node: NodeProto) -> None:
        if self.constants.computes(node) or not any(node.output) or node.output[0] in self._taken:
            return
        if node.op_type == "Split" and (pieces := self._pieces(node)) is not None:
            for name, piece in zip(node.output, pieces, strict=True):
                self._add_reading(node, name, piece)
            return
        if node.op_type == "SplitToSequence" and self.constants.is_plain(node) and self._only_indexed(node):
            self._sequences[node.output[0]] = node
            return
        if node.op_type == "SequenceAt" and node.input[0] in self._sequences:
            self._read_piece(node)
            return
        reading = self._reading(node)
        nodes = (node, *reading.nodes)
        result = next(name for name in nodes[-1].output if name)
        self._taken.update(name for extra in reading.nodes for name in extra.output)
        self._add_reading(node, result, reading, nodes)
        for name in nodes[-1].output:
            if name and name != result:  # a further output of an operation that no affine crosses
                self._add(Opaque(), OnnxSource((node,), name, (result,)), _described(node), label(node))

    def _pieces(self, node: NodeProto) -> list[OnnxReading] | None:
        view = NodeView(node, self._context)
        if not self.constants.is_plain(node) or view.is_constant(0) or not all(node.output):
            return None
        try:
            return read_split(view)
        except _CONTRADICTIONS:
            return None

    def _only_indexed(self, node: NodeProto) -> bool:
        """Return True if every reader of a sequence takes one of its pieces, at a constant position."""
        name = node.output[0]
        users = self._users.get(name, [])
        indexed = (user.op_type == "SequenceAt" and self.constants.known(user.input[1]) for user in users)
        return len(users) == self._context.readers[name] and all(map(self.constants.is_plain, users)) and all(indexed)

    def _read_piece(self, node: NodeProto) -> None:
        split = self._sequences[node.input[0]]
        try:
            found = read_piece(NodeView(split, self._context), NodeView(node, self._context))
        except _CONTRADICTIONS:
            found = None
        if found is None:
            found = OnnxReading(Opaque(), (split.input[0],), nodes=(node,))
        self._add_reading(node, node.output[0], found, (split, *found.nodes))

    def _reading(self, node: NodeProto) -> OnnxReading:
        view = NodeView(node, self._context)
        found: OnnxReading | str | None = None
        why, hint = "a function of the file has its name", "another name for that function"
        if self.constants.is_plain(node):
            if node.op_type in SHAPE_ONLY:
                return OnnxReading(Opaque(), ())
            reader = ONNX_READERS.get(node.op_type)
            try:
                found = reader(view) if reader is not None else None
            except _CONTRADICTIONS:
                found = "its attributes and constants contradict each other"
            if isinstance(found, OnnxReading) and all(name in self.by_name for name in found.inputs):
                return found
            why, hint = found if isinstance(found, str) else "its input is a constant", ""
        if is_batch_norm(node):
            return unread_batch_norm(view, why, hint)
        return OnnxReading(Opaque(found if isinstance(found, str) else ""), tuple(reads(node)))

    def _add_reading(
        self, node: NodeProto, name: str, reading: OnnxReading, nodes: tuple[NodeProto, ...] | None = None
    ) -> None:
        known = tuple(item for item in reading.inputs if item in self.by_name)
        source = OnnxSource(nodes or (node,), name, known, reading.weight, reading.bias)
        self._add(reading.kind, source, _described(node), label(node), reading.call)

    def _add(self, kind: Kind, source: OnnxSource, name: str, path: str, call: NormCall | None = None) -> None:
        shape, dtype = self.shapes.of(source.output), self.shapes.dtype(source.output)
        inputs = [self.by_name[item] for item in source.reads]
        op = Op(kind, inputs, shape or (), dtype, name, path, source, norm=call)
        self.ops.append(op)
        self.by_name[source.output] = op

    def _add_output(self) -> None:
        names = tuple(value.name for value in self.model.graph.output if value.name in self.by_name)
        inputs = [self.by_name[name] for name in names]
        kind = Opaque(is_output=True)
        self.ops.append(Op(kind, inputs, (), None, "the model's output", "", OnnxSource((), "", names)))

    # --- evaluating ---

    def evaluate(self, op: Op, kind: Kind, inputs: Sequence[Tensor]) -> Tensor:
        """See ``Graph.evaluate``."""
        if isinstance(kind, Identity):
            return inputs[kind.index]
        if kind is op.original:
            return self._run(op, inputs, None)
        if isinstance(kind, Layer):
            value = self._run(op, inputs, kind)
            return value if kind.after is None else value + kind.after.to(value)
        return evaluate_kind(kind, inputs)

    def _run(self, op: Op, inputs: Sequence[Tensor], layer: Layer | None) -> Tensor:
        """Run an operation's nodes on float64 values, with the weight and bias of ``layer`` if it is given."""
        source: OnnxSource = op.source
        if isinstance(op.original, Reshape):
            return inputs[0].reshape(self._target(op, inputs[0]))
        feeds: dict[str, Array] = {name: value.numpy() for name, value in zip(source.reads, inputs, strict=True)}
        if layer is not None:
            feeds |= _tensors(op, layer)
        if (layer is not None) not in source.evaluators:
            source.evaluators[layer is not None] = self._evaluator(source, fed=layer is not None)
        evaluator = source.evaluators[layer is not None]
        for name in evaluator.input_names:
            if name not in feeds and not self.constants.known(name):
                raise RuntimeError(f"{op.name} reads {name!r}, which has no value here")
            if name not in feeds:
                feeds[name] = self.constants.value(name)
        try:
            with np.errstate(all="ignore"):
                (found,) = evaluator.run(None, {name: feeds[name] for name in evaluator.input_names})
        except Exception as error:  # numpy raises any class inside an operator
            raise RuntimeError(f"{op.name} can't be evaluated: {error}") from error
        if not isinstance(found, np.ndarray) or found.dtype != np.float64:
            raise RuntimeError(f"{op.name} has a result that is not float64")
        return torch.from_numpy(np.ascontiguousarray(found))

    def _evaluator(self, source: OnnxSource, *, fed: bool) -> Any:
        nodes = list(source.nodes)
        if fed:
            nodes = with_tensors(nodes, source.weight, source.bias, weight=_WEIGHT, bias=_BIAS if source.bias else None)
        own = {name for node in nodes for name in node.output}
        names = [name for node in nodes for name in node.input if name and name not in own]
        return node_evaluator(nodes, self.model, names, source.output)

    def _target(self, op: Op, value: Tensor) -> list[int]:
        """Return the target shape for a value with the sizes of this probe."""
        pairs = zip(op.inputs[0].shape, value.shape, strict=True)
        sizes = {size: number for size, number in pairs if not isinstance(size, int)}
        found = [size if isinstance(size, int) else size.subs(sizes) for size in op.shape]
        return [int(size) if isinstance(size, int) or size.is_number else -1 for size in found]

    def probe(self, op: Op, generator: torch.Generator, *, largest: int | None) -> Tensor:
        """See ``Graph.probe``."""
        sizes = self.shapes.example(op.source.output)
        if op.dtype is None or not op.dtype.is_floating_point or sizes is None:
            raise RuntimeError(f"{op.name} is not a floating-point value of a known shape")
        if largest is not None:
            sizes = [*sizes[:2], *(min(size, largest) for size in sizes[2:])]
        return torch.randn(sizes, generator=generator, dtype=torch.float64)


def _described(node: NodeProto) -> str:
    return f"{node.op_type} ({label(node)})"


def _tensors(op: Op, layer: Layer) -> dict[str, Array]:
    """Return a layer's weight and bias to feed; a missing bias is fed as zeros, which add nothing."""
    feeds = {_WEIGHT: layer.weight.load().numpy()}
    if op.source.bias is not None:
        size = channels_of(layer.layout, layer.weight.shape, layer.groups)[1]
        feeds[_BIAS] = np.zeros(size) if layer.bias is None else layer.bias.load().contiguous().numpy()
    return feeds


def with_tensors(
    nodes: Sequence[NodeProto], weight_at: Slot | None, bias_at: Slot | None, *, weight: str | None, bias: str | None
) -> list[NodeProto]:
    """Return copies of a layer's nodes that read the named weight and bias at these places; None keeps the present tensor.

    The same copies are evaluated in a proof and written. Gemm multiplies its weight by alpha and its bias by beta. A folded
    tensor includes the factor, which is removed from the node.
    """
    copies = [deepcopy(node) for node in nodes]
    for place, name, factor in ((weight_at, weight, "alpha"), (bias_at, bias, "beta")):
        if place is None or name is None:
            continue
        node, slot = copies[place[0]], place[1]
        while len(node.input) <= slot:
            node.input.append("")
        node.input[slot] = name
        if node.op_type == "Gemm":
            refill(node.attribute, [item for item in node.attribute if item.name != factor])
    return copies
