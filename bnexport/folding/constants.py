"""Which values of a graph are constants, and what they are in float64."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten

#: Casts to a wider floating type inside a constant are skipped, so that the constant keeps its float64 precision. One that
#: rounds (to float16, to an integer) is part of what the network computes.
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)
#: Operators that return their input itself although their schema does not say so.
_MAY_RETURN_INPUT = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.clone.default,
    operator.getitem,  # one of the views that chunk, split or unbind return
)


class Constants:
    """Values that depend on parameters, buffers and literals alone, computed in float64 when asked for.

    A parameter or buffer that some operator of the graph changes in place (also through a view) is not a constant: what
    it holds depends on when it is read.

    Attributes:
        mutated: What some operator changes in place: targets of attributes, and computed nodes.
    """

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._values: dict[Node, Tensor | None] = {}
        self.mutated = set(_mutated_memory(module))

    def value(self, item: Any) -> Tensor | None:
        """The constant that an operator's argument stands for, in float64; None when it is not a constant.

        Args:
            item: A node, a number, or anything else that may stand in a node's arguments.
        """
        if isinstance(item, bool) or not isinstance(item, (int, float, Node)):
            return None
        if isinstance(item, (int, float)):
            return torch.tensor(float(item), dtype=torch.float64)
        found = self._stored(item)
        return None if found is None else _wide(found)

    def known(self, item: Any) -> bool:
        """Whether ``value`` has an answer; without the cost of widening it."""
        return isinstance(item, (int, float)) or (isinstance(item, Node) and self._stored(item) is not None)

    def _stored(self, node: Node) -> Tensor | None:
        """The value in the element type that it has; only computed constants are held in float64."""
        if node not in self._values:
            self._resolve(node)
        return self._values[node]

    def _resolve(self, target: Node) -> None:
        """Compute ``target`` and what it needs, without recursion: constant subgraphs can be long."""
        stack = [target]
        while stack:
            node = stack[-1]
            missing = [parent for parent in node.all_input_nodes if parent not in self._values]
            if node in self._values:
                stack.pop()
            elif node.op == "call_function" and missing and _is_pure(node):
                stack.extend(missing)
            else:
                self._values[stack.pop()] = self._compute(node)

    def _compute(self, node: Node) -> Tensor | None:
        if memory_of(node) in self.mutated:
            return None
        if node.op == "get_attr":
            value = attribute(self._module, str(node.target))
            return value.detach() if isinstance(value, Tensor) else None
        parents = node.all_input_nodes
        if node.op != "call_function" or not _is_pure(node) or not parents:
            return None
        if any(self._values[parent] is None for parent in parents):
            return None
        args = torch.fx.map_arg(node.args, self._wide_value)
        kwargs = torch.fx.map_arg(node.kwargs, self._wide_value)
        if node.target in _CASTS and isinstance(args[0], Tensor) and _widens(node):
            return args[0]
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(result, Tensor):
            return None
        return _wide(result)

    def _wide_value(self, node: Node) -> Tensor | None:
        value = self._values[node]
        return None if value is None else _wide(value)


def _wide(value: Tensor) -> Tensor:
    """In float64 on the CPU, wherever the network is: the algebra is small, and one device knows no mix-ups."""
    value = value.cpu()
    return value.double() if value.is_floating_point() else value


def attribute(module: torch.nn.Module, target: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _is_pure(node: Node) -> bool:
    """Deterministic, without side effects: safe to compute once, ahead of time."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]


def _widens(cast: Node) -> bool:
    """Whether a cast keeps every value: from a floating type to itself or to one with more bits."""
    source = cast.args[0]
    before = source.meta.get("val") if isinstance(source, Node) else None
    after = cast.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if not before.is_floating_point() or not after.is_floating_point():
        return False
    return before.dtype == after.dtype or torch.finfo(after.dtype).bits > torch.finfo(before.dtype).bits


def _mutated_memory(module: GraphModule) -> Iterator[str | Node]:
    """What some in-place operator changes, directly or through a view: targets of attributes, and computed nodes."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            yield from map(memory_of, _nodes(given))
    # Training-mode batch_norm changes its statistics without saying so in its schema.
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is aten.batch_norm.default and node.args[5]:
            yield from (memory_of(item) for item in node.args[3:5] if isinstance(item, Node))


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(value, found.append)
    return found


def memory_of(node: Node) -> str | Node:
    """Whose memory ``node`` may share: the target of an attribute, or the node that computed it."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        schema = getattr(node.target, "_schema", None)
        shares = schema is not None and any(item.alias_info is not None for item in schema.returns)
        if not shares and node.target not in _MAY_RETURN_INPUT:
            break
        node = node.args[0]
    return str(node.target) if node.op == "get_attr" else node
