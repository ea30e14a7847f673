"""Write changed operations back into a graph of torch.export: cast once, named as before, unused parts removed.

Afterwards, tensors that the network creates in forward follow the device of its input, wherever the network was traced.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from bnexport.errors import ProofError
from bnexport.folding.affine import Affine, is_finite
from bnexport.folding.graph import Clamp, ConstantAffine, Identity, Layer, Op, Weight, weights_now
from bnexport.folding.torch_backend.nodes import argument
from bnexport.folding.torch_backend.torch_constants import attribute
from bnexport.folding.torch_backend.torch_graph import TorchGraph, TorchSource

aten = torch.ops.aten


def flushed(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a float64 tensor in its element type, rounded once.

    A subnormal result is flushed to zero: it is below the resolution of every sum, and slows a CPU several times. Float16 is
    excluded, because its subnormal numbers (below 6e-5) are as large as many weights.
    """
    cast = value.to(dtype)
    if dtype is torch.float16:
        return cast
    return torch.where(cast.abs() < torch.finfo(dtype).tiny, torch.zeros_like(cast), cast)


def check_stored(stored: Tensor, value: Tensor, target: str) -> None:
    """Check that the stored tensor is the proved float64 tensor, rounded once."""
    if torch.equal(stored, value.to(stored.dtype)):
        return  # nearly always; the check below costs several passes more
    info = torch.finfo(stored.dtype)
    finite = torch.isfinite(value)  # an absent bound of a clamp is infinite
    allowed = info.eps * value.abs() + info.tiny
    if not bool(((stored.double() - value).abs() <= allowed)[finite].all()):
        raise ProofError(
            f"the tensor stored as {target} is not the folded tensor rounded once",
            remedy="Please report it with the model: that is a fault in bnexport",
        )


class TorchWriter:
    """Writes the changed operations of one graph back into its module."""

    def __init__(self, graph: TorchGraph) -> None:
        self.graph = graph
        self.module = graph.module
        self.exact: dict[str, Tensor] = {}  # The written tensors in float64 before their one cast, by attribute
        self.standalone = 0  # Number of elements of the affines that stay, which are not copies
        self._written: dict[Weight, str] = {}
        self._kept = self._names_still_read()
        self._obsolete: list[Node] = []
        self._now: dict[Op, Node] = {op: op.source.result for op in graph.ops}  # Nodes with the present values

    def write(self, dropped: tuple[Op, ...]) -> None:
        """Write every changed operation, and remove operations without a reader."""
        left_out = set(dropped)
        for op in self.graph.ops:
            if op not in left_out and (op.changed or self._needs_canonical_form(op)):
                self._write(op)
        gone = [node for op in dropped for node in op.source.nodes] + self._obsolete + self.graph.aliases
        order = {node: index for index, node in enumerate(self.module.graph.nodes)}
        for node in sorted(dict.fromkeys(gone), key=order.__getitem__, reverse=True):
            if not node.users:
                self.module.graph.erase_node(node)

    def _needs_canonical_form(self, op: Op) -> bool:
        """Return True for a norm that stays and has several steps, or has parameters of another type than its value.

        ONNX Runtime has no BatchNormalization of mixed types.
        """
        if op.norm is None or not isinstance(op.kind, ConstantAffine) or op.dtype is None:
            return False
        read = op.source.result.all_input_nodes
        stored = {item.meta["val"].dtype for item in read if self.graph.constants.known(item)}
        if len(op.source.nodes) == 1 and stored <= {op.dtype}:
            return False
        return is_finite(op.kind.affine.mapped(lambda tensor: tensor.to(op.dtype)))

    def _write(self, op: Op) -> None:
        kind, source = op.kind, op.source
        if isinstance(kind, Layer):
            self._layer(op, kind)
        elif isinstance(kind, Identity):
            self._replace(op, self._now[op.inputs[0]])
        elif isinstance(kind, ConstantAffine):
            self._replace(op, self._norm(op, kind.affine, source.result))
        elif isinstance(kind, Clamp):
            self._replace(op, self._clamp(op, kind, source.result))

    def _replace(self, op: Op, result: Node) -> None:
        op.source.result.replace_all_uses_with(result)
        self._obsolete += op.source.nodes
        self._now[op] = result

    # --- layers ---

    def _layer(self, op: Op, kind: Layer) -> None:
        source: TorchSource = op.source
        (node,) = source.nodes
        before = op.original
        assert isinstance(before, Layer)
        assert source.weight is not None
        arguments, kwargs = list(node.args), dict(node.kwargs)
        for name, position, new, old in (
            ("weight", source.weight, kind.weight, before.weight),
            ("bias", source.bias, kind.bias, before.bias),
        ):
            if position is None or new is old or new is None:
                continue
            arguments += [None] * (position + 1 - len(arguments))
            arguments[position] = self._stored(op, name, new, argument(node, position, name))
            kwargs.pop(name, None)
        node.args, node.kwargs = tuple(arguments), kwargs
        if kind.after is not None:
            graph = self.module.graph
            with graph.inserting_after(node):
                total = graph.call_function(aten.add.Tensor)
            node.replace_all_uses_with(total)
            with graph.inserting_before(node):
                constant = self._constant(op, "shift", kind.after, kind.weight.dtype)
            total.args = (node, constant)
            self._now[op] = _like(total, node)

    def _stored(self, op: Op, name: str, new: Weight, given: Any) -> Node:
        """Return a node that reads a folded weight, under the old name unless that attribute has other readers."""
        target = self._written.get(new)  # calls that fold alike keep sharing one weight
        if target is None:
            own = isinstance(given, Node) and given.op == "get_attr" and str(given.target) not in self._kept
            target = str(given.target) if own else self._free_name(op, name)
            self._kept.add(target)
            self._written[new] = target
            self._set(target, new.load(), new.dtype)
        with self.module.graph.inserting_before(op.source.nodes[0]):
            return self._reader(target)

    def _reader(self, target: str) -> Node:
        """Return a new node that reads an attribute, at the graph's insertion point."""
        node = self.module.graph.get_attr(target)
        node.meta["val"] = attribute(self.module, target)
        return node

    def _set(self, target: str, value: Tensor, dtype: torch.dtype) -> None:
        holder, _, leaf = target.rpartition(".")
        module = self.module.get_submodule(holder)
        tensors = chain([getattr(module, leaf, None)], self.module.parameters(), self.module.buffers())
        device = next((item.device for item in tensors if isinstance(item, Tensor)), torch.device("cpu"))
        if leaf in module._buffers:
            del module._buffers[leaf]
        stored = flushed(value, dtype)
        check_stored(stored, value, target)
        setattr(module, leaf, torch.nn.Parameter(stored.to(device), requires_grad=False))
        self.exact[target] = value

    def _constant(self, op: Op, name: str, value: Tensor, dtype: torch.dtype) -> Node:
        """Add an attribute next to an operation, and return a node that reads it, at the graph's insertion point."""
        target = self._free_name(op, name)
        self.standalone += 0 if isinstance(op.kind, Layer) else value.numel()
        self._set(target, value, dtype)
        return self._reader(target)

    def _free_name(self, op: Op, name: str) -> str:
        """Return an unused attribute name in the operation's module."""
        holder: torch.nn.Module = self.module
        for part in op.path.split(".") if op.path else ():
            if not isinstance(getattr(holder, part, None), torch.nn.Module):
                holder.add_module(part, torch.nn.Module())
            holder = attribute(holder, part)
        candidate, number = name, 1
        while hasattr(holder, candidate):
            candidate, number = f"{name}_{number}", number + 1
        return f"{op.path}.{candidate}" if op.path else candidate

    def _names_still_read(self) -> set[str]:
        """Return the attributes that must keep their values because an unchanged operation reads them."""
        replaced = Counter(old.name for old, new in weights_now(self.graph.ops) if new is not old)
        nodes = self.module.graph.find_nodes(op="get_attr")
        readers = Counter(str(node.target) for node in nodes for _ in node.users)
        return {name for name, count in readers.items() if count > replaced[name]}

    # --- affines and clamps that stay ---

    def _norm(self, op: Op, affine: Affine, before: Node) -> Node:
        """Write one canonical affine: a batch norm with fixed statistics if the channels are on axis 1, else arithmetic."""
        assert op.dtype is not None
        graph, value = self.module.graph, self._now[op.inputs[0]]
        channels = op.shape[1] if op.rank >= 2 else None
        single = affine.scale.numel() == 1  # the same for all channels: no vector is worth storing
        vector = affine.channels(1, channels) if isinstance(channels, int) and not single else None
        with graph.inserting_before(before):
            if vector is not None and affine.has_scale:
                scale = self._constant(op, "scale", vector.scale.clone(), op.dtype)
                shift = self._constant(op, "shift", vector.shift.clone(), op.dtype)
                mean = self._constant(op, "zeros", torch.zeros_like(vector.scale), op.dtype)
                var = self._constant(op, "ones", torch.ones_like(vector.scale), op.dtype)
                arguments = (value, scale, shift, mean, var, False, 0.0, 0.0, False)
                return _like(graph.call_function(aten.batch_norm.default, arguments), before)
            result = value
            if affine.has_scale:
                scale = self._constant(op, "scale", affine.scale, op.dtype)
                result = _like(graph.call_function(aten.mul.Tensor, (result, scale)), before)
            if affine.has_shift:
                shift = self._constant(op, "shift", affine.shift, op.dtype)
                result = _like(graph.call_function(aten.add.Tensor, (result, shift)), before)
            return result

    def _clamp(self, op: Op, kind: Clamp, before: Node) -> Node:
        assert op.dtype is not None
        graph, result = self.module.graph, self._now[op.inputs[0]]
        bounds = (("low", kind.low, aten.maximum.default), ("high", kind.high, aten.minimum.default))
        with graph.inserting_before(before):
            for name, bound, target in bounds:
                if bool(torch.isinf(bound).all()):
                    continue
                if bool((bound == 0).all()) and name == "low":
                    result = _like(graph.call_function(aten.relu.default, (result,)), before)
                    continue
                limit = self._constant(op, name, bound, op.dtype)
                result = _like(graph.call_function(target, (result, limit)), before)
        return result


def _like(node: Node, other: Node) -> Node:
    """Give a new node the module and the traced value of the node that it replaces."""
    for key in ("nn_module_stack", "val", "stack_trace"):
        if key in other.meta:
            node.meta[key] = other.meta[key]
    return node


def follow_input(module: GraphModule) -> None:
    """Replace each device that a graph names by the device of the graph's first tensor, in place.

    torch.export writes the device of tracing into factories and casts: ``torch.zeros(n, device=x.device)`` of a network on the
    CPU becomes ``zeros(n, device="cpu")``, which fails as soon as the folded network is moved.
    """
    for part in module.modules():
        if isinstance(part, GraphModule):
            _follow(part)


def _follow(part: GraphModule) -> None:
    graph = part.graph
    inputs = graph.find_nodes(op="placeholder")
    first = next((node for node in inputs if isinstance(node.meta.get("val"), Tensor)), None)
    naming = [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and any(isinstance(item, torch.device) for item in pytree.tree_leaves((node.args, node.kwargs)))
    ]
    if first is None or not naming:
        return
    with graph.inserting_after(inputs[-1]):
        device = graph.call_function(getattr, (first, "device"))

    def followed(item: Any) -> Any:
        return device if isinstance(item, torch.device) else item

    for node in naming:
        node.args, node.kwargs = map_aggregate(node.args, followed), map_aggregate(node.kwargs, followed)
    part.recompile()
