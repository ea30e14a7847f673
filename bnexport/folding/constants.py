"""Which values of a graph are constants, and what they are in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten

#: Casts between floating types inside a constant: skipped, so that the constant keeps its float64 precision.
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)
#: Operators that return their input itself although their schema does not say so.
_MAY_RETURN_INPUT = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.clone.default)
_NOT_DETERMINED: Any = object()


class Constants:
    """Values that depend on parameters, buffers and literals alone, computed in float64 when asked for.

    A parameter or buffer that some operator of the graph changes in place (also through a view) is not a constant: what
    it holds depends on when it is read.

    Attributes:
        exact: Folded attributes in float64, before their one cast.
    """

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._values: dict[Node, Tensor | None] = {}
        self.exact: dict[str, Tensor] = {}
        self._mutated = set(_mutated_attributes(module))

    def value(self, item: Any) -> Tensor | None:
        """The constant that an operator's argument stands for, in float64; None when it is not a constant.

        Args:
            item: A node, a number, or anything else that may stand in a node's arguments.
        """
        if isinstance(item, bool) or not isinstance(item, (int, float, Node)):
            return None
        if isinstance(item, (int, float)):
            return torch.tensor(float(item), dtype=torch.float64)
        if item not in self._values:
            self._resolve(item)
        return self._values[item]

    def replace(self, target: str, value: Tensor) -> None:
        """Take note of a folded attribute: a second fold into it starts from the float64 value, not from its cast."""
        self.exact[target] = value
        self._values.clear()

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
        if node.op == "get_attr":
            if node.target in self._mutated:
                return None
            value = self.exact.get(str(node.target), attribute(self._module, str(node.target)))
            if not isinstance(value, Tensor):
                return None
            return value.detach().double() if value.is_floating_point() else value.detach()
        parents = node.all_input_nodes
        if node.op != "call_function" or not _is_pure(node) or not parents:
            return None
        if any(self._values[parent] is None for parent in parents):
            return None
        args = torch.fx.map_arg(node.args, self._values.__getitem__)
        kwargs = torch.fx.map_arg(node.kwargs, self._values.__getitem__)
        if node.target in _CASTS and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return args[0]
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        return result if isinstance(result, Tensor) else None


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


def _mutated_attributes(module: GraphModule) -> Iterator[str]:
    """Targets of the attributes that some in-place operator changes, directly or through a view."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            for root in (_root(item) for item in _nodes(given)):
                if root.op == "get_attr":
                    yield str(root.target)
    # Training-mode batch_norm changes its statistics without saying so in its schema.
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is aten.batch_norm.default and node.args[5]:
            yield from (str(item.target) for item in node.args[3:5] if isinstance(item, Node) and item.op == "get_attr")


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(value, found.append)
    return found


def _root(node: Node) -> Node:
    """The node whose memory ``node`` may share."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        schema = getattr(node.target, "_schema", None)
        shares = schema is not None and any(item.alias_info is not None for item in schema.returns)
        if not shares and node.target not in _MAY_RETURN_INPUT:
            break
        node = node.args[0]
    return node
