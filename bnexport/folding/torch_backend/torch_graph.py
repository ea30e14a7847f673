"""The backend for graphs of torch.export: read into values, evaluated in float64."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bnexport.folding.affine import Dim
from bnexport.folding.graph import Clamp, ConstantAffine, Identity, Kind, Layer, NormCall, Op, Opaque, Weight, connect
from bnexport.folding.torch_backend.nodes import (
    TorchReading,
    channels_of,
    describe,
    dtype_of,
    module_class,
    module_path,
)
from bnexport.folding.torch_backend.torch_constants import TorchConstants, attribute
from bnexport.folding.torch_backend.torch_norms import NormReading, read_norms
from bnexport.folding.torch_backend.torch_readers import POOLS_WITH_POSITIONS, SPLITS, TORCH_READERS, is_whole_slice

aten = torch.ops.aten

_CHANGED = "its input or output may be changed in forward, in place (x += 1, x.add_(1))"
_CONSTANT = "its input is a constant, so its result is a constant, too"
#: Operators that take only the shape of their second argument.
_LIKE = (aten.view_as.default, aten.reshape_as.default)
#: Operators that read a tensor's shape or type and not its elements.
SHAPE_ONLY = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten._assert_tensor_metadata.default)


@dataclass(frozen=True)
class TorchSource:
    """The origin of a value: the nodes that compute it in order, and the nodes whose values are ``Op.inputs``.

    ``weight`` and ``bias`` are the positions of a layer's tensors among the node's arguments.
    """

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    weight: int | None = None
    bias: int | None = None

    @property
    def result(self) -> Node:
        """The node that has the value."""
        return self.nodes[-1]


class TorchGraph:
    """A graph of ATen operators as ``folding.graph.Graph``; the module is not changed."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.constants = TorchConstants(module)
        self.ops: list[Op] = []
        self.by_node: dict[Node, Op] = {}  # Node -> the operation whose value it has
        self.aliases: list[Node] = []  # Nodes that return another node's whole value: the first slice of ``x[:, 2:]``
        self._weights: dict[str | Node, Weight] = {}
        self._norms = read_norms(module, self.constants)
        for node in module.graph.nodes:
            self._read(node)
        connect(self.ops)

    @property
    def elements(self) -> int:
        """Elements of all parameters and buffers."""
        return sum(tensor.numel() for tensor in (*self.module.parameters(), *self.module.buffers()))

    # --- reading ---

    def _read(self, node: Node) -> None:
        norm = self._norms.get(node)
        if node.target in SHAPE_ONLY or (norm is not None and node is not norm.nodes[-1]):
            return  # the last step of a norm represents the norm
        if node.op in ("get_attr", "call_function") and self.constants.known(node):
            if norm is not None and norm.counts:  # a call in the report, but not a value that an affine could cross
                channels, source = channels_of(norm.value, norm.axis, norm.affine), TorchSource(norm.nodes, ())
                call = NormCall(module_path(node), module_class(node), channels, None, _CONSTANT)
                self.ops.append(Op(Opaque(), [], (), None, describe(node), call.module, source, norm=call))
            return
        if _is_transparent_split(node) or (node.op == "call_function" and _is_size(node)):
            return
        if not node.users and node.target is operator.getitem and _is_transparent_split(node.args[0]):
            return  # positions of a pooling that are not used
        whole = node.args[0] if is_whole_slice(node) else None
        if isinstance(whole, Node) and whole in self.by_node:
            self.by_node[node] = self.by_node[whole]
            self.aliases.append(node)
            return
        if norm is not None:
            self._add(self._norm(norm), TorchSource(norm.nodes, (norm.value,)), self._call(norm))
            return
        reading = self._reading(node)
        self._add(reading.kind, TorchSource((node,), tuple(reading.inputs), reading.weight, reading.bias))

    def _reading(self, node: Node) -> TorchReading:
        everything = tuple(item for item in node.all_input_nodes if self._is_value(item))
        if node.op == "output":
            return TorchReading(Opaque(is_output=True), everything)
        reader = TORCH_READERS.get(node.target) if node.op == "call_function" else None
        found = reader(node, self) if reader is not None else None
        if isinstance(found, str):
            return TorchReading(Opaque(found), everything)
        if self.constants.changes(node, *everything):
            return TorchReading(Opaque(_CHANGED), everything)
        if found is None or any(not isinstance(item, Node) or not self._is_value(item) for item in found.inputs):
            return TorchReading(Opaque(), everything)
        return found

    def _is_value(self, node: Node) -> bool:
        return node in self.by_node or _is_transparent_split(node)

    def _norm(self, norm: NormReading) -> Kind:
        if norm.affine is None or norm.why_not or self.constants.changes(norm.value, *norm.nodes):
            return Opaque(norm.why_not or _CHANGED)
        if not norm.counts and not norm.affine.has_scale and not norm.affine.has_shift:
            return Identity()  # x + 0, x * 1
        return ConstantAffine(norm.affine)

    def _call(self, norm: NormReading) -> NormCall | None:
        if not norm.counts:
            return None
        node = norm.nodes[-1]
        affine = norm.affine if isinstance(self._norm(norm), ConstantAffine) else None
        channels = channels_of(norm.value, norm.axis, norm.affine)
        why = norm.why_not or ("" if affine is not None else _CHANGED)
        return NormCall(module_path(node), module_class(node), channels, affine, why, norm.hint, norm.offset)

    def _add(self, kind: Kind, source: TorchSource, call: NormCall | None = None) -> None:
        node = source.result
        inputs = [self.by_node[item] for item in _readable(source, self.by_node)]
        if not inputs and not isinstance(kind, Opaque):
            kind = Opaque()
        value = node.meta.get("val")
        shape = tuple(map(_dim, value.shape)) if isinstance(value, Tensor) else ()
        op = Op(kind, inputs, shape, dtype_of(node), describe(node), module_path(node), source, norm=call)
        self.ops.append(op)
        self.by_node[node] = op

    def weight(self, node: Any) -> Weight | None:
        """Return the stored tensor of a node; None if it is not a constant."""
        if not isinstance(node, Node) or not self.constants.known(node):
            return None
        key = str(node.target) if node.op == "get_attr" else node
        if key not in self._weights:
            stored = attribute(self.module, str(node.target)) if node.op == "get_attr" else node.meta["val"]
            nodes = node.graph.find_nodes(op="get_attr", target=node.target) if node.op == "get_attr" else [node]
            readers = sum(len(item.users) for item in nodes) + self._is_computed_from_shared(node)
            name = key if isinstance(key, str) else node.name
            self._weights[key] = Weight(name, tuple(stored.shape), stored.dtype, lambda: self._loaded(node), readers)
        return self._weights[key]

    def _is_computed_from_shared(self, node: Node) -> bool:
        """Return True if folding a computed weight would add elements, because its sources have other readers."""
        inside, stack = {node}, [node]
        while stack:
            for parent in stack.pop().all_input_nodes:
                if parent not in inside:
                    inside.add(parent)
                    stack.append(parent)
        others = {user for item in inside - {node} for user in item.users} - inside
        return any(user.users or user.op == "output" for user in others if user.target not in SHAPE_ONLY)

    def _loaded(self, node: Node) -> Tensor:
        value = self.constants.value(node)
        assert value is not None
        return value.double()

    # --- evaluating ---

    def evaluate(self, op: Op, kind: Kind, inputs: Sequence[Tensor]) -> Tensor:
        """See ``Graph.evaluate``."""
        if isinstance(kind, Identity):
            return inputs[kind.index]  # its own cast to the network's type would not keep float64
        if kind is op.original or isinstance(kind, Opaque):
            return self._run(op, inputs, {})
        if isinstance(kind, Layer):
            source: TorchSource = op.source
            assert source.weight is not None
            replaced: dict[int, Tensor | None] = {source.weight: kind.weight.load()}
            if source.bias is not None:
                replaced[source.bias] = None if kind.bias is None else kind.bias.load()
            value = self._run(op, inputs, replaced)
            return value if kind.after is None else value + kind.after.to(value)
        return evaluate_kind(kind, inputs)

    def _run(self, op: Op, inputs: Sequence[Tensor], replaced: dict[int, Tensor | None]) -> Tensor:
        """Run an operation's nodes on float64 values; ``replaced`` holds arguments to replace, by position."""
        source: TorchSource = op.source
        values: dict[Node, Any] = dict(zip(_readable(source, self.by_node), inputs, strict=True))
        with torch.no_grad():
            for read in source.reads:
                if read not in values:
                    values[read] = self._call_node(read, values, {})
            for node in source.nodes:
                values[node] = self._call_node(node, values, replaced)
        result = values[source.result]
        assert isinstance(result, Tensor)
        return result

    def _call_node(self, node: Node, values: dict[Node, Any], replaced: dict[int, Tensor | None]) -> Any:
        def look_up(item: Node) -> Any:
            if item in values:
                return values[item]
            constant = self.constants.value(item)
            if constant is not None:
                return constant
            hint = item.meta.get("val")
            if isinstance(hint, (torch.SymInt, int)):
                return _hint(hint)
            if node.target in _LIKE and isinstance(hint, Tensor):
                return torch.empty((), dtype=torch.float64).expand([_hint(size) for size in hint.shape])
            raise RuntimeError(f"{item.name} has no value here")

        args = list(torch.fx.map_arg(node.args, look_up))
        kwargs = {
            name: torch.fx.map_arg(value, look_up)
            for name, value in node.kwargs.items()
            if name not in ("weight", "bias") or not replaced
        }
        for position, value in replaced.items():
            args += [None] * (position + 1 - len(args))
            args[position] = value
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def probe(self, op: Op, generator: torch.Generator, *, largest: int | None) -> Tensor:
        """See ``Graph.probe``."""
        value = op.source.result.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise RuntimeError(f"{op.name} is not a floating-point value")
        sizes = [_hint(size) for size in value.shape]
        if largest is not None:
            sizes = [*sizes[:2], *(min(size, largest) for size in sizes[2:])]
        return torch.randn(sizes, generator=generator, dtype=torch.float64)


def evaluate_kind(kind: Kind, inputs: Sequence[Tensor]) -> Tensor:
    """Return the float64 result of a kind that folding created."""
    if isinstance(kind, ConstantAffine):
        return kind.affine(inputs[0])
    if isinstance(kind, Clamp):
        return torch.minimum(torch.maximum(inputs[0], kind.low.to(inputs[0])), kind.high.to(inputs[0]))
    raise TypeError(f"{type(kind).__name__} is not created by folding")


def _readable(source: TorchSource, by_node: dict[Node, Op]) -> list[Node]:
    """Return the nodes whose values are an operation's inputs; for a piece of a split, the split's inputs."""
    found: list[Node] = []
    for read in source.reads:
        found += [read] if read in by_node else [item for item in read.all_input_nodes if item in by_node]
    return found


def _is_transparent_split(node: Any) -> bool:
    """Return True for a split whose readers all take one piece (a slice), or a pooling whose positions are not used."""
    if not all(user.target is operator.getitem for user in node.users):
        return False
    if node.target in POOLS_WITH_POSITIONS:
        return all(user.args[1] == 0 or not user.users for user in node.users)
    return node.target in SPLITS


def _is_size(node: Node) -> bool:
    """Return True for arithmetic on sizes."""
    value = node.meta.get("val")
    return isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat, int)) and not any(
        isinstance(item.meta.get("val"), Tensor) for item in node.all_input_nodes
    )


def _dim(size: Any) -> Dim:
    return size if isinstance(size, int) else size.node.expr


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
