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
        exact: Folded attributes in float64, before their one cast.
    """

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._values: dict[Node, Tensor | None] = {}
        self.exact: dict[str, Tensor] = {}
        self._mutated = set(_mutated_memory(module))

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
        """Take note of a folded attribute: a second fold into it starts from the float64 value, not from its cast.

        Nothing else is computed anew: an attribute that is folded into has one reader, the layer itself.
        """
        self.exact[target] = value
        for node in self._module.graph.find_nodes(op="get_attr", target=target):
            self._values.pop(node, None)

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
        if _memory(node) in self._mutated:
            return None
        if node.op == "get_attr":
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
        if node.target in _CASTS and isinstance(args[0], Tensor) and _widens(node):
            return args[0]
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(result, Tensor):
            return None
        return result.double() if result.is_floating_point() else result


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
            yield from map(_memory, _nodes(given))
    # Training-mode batch_norm changes its statistics without saying so in its schema.
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is aten.batch_norm.default and node.args[5]:
            yield from (_memory(item) for item in node.args[3:5] if isinstance(item, Node))


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(value, found.append)
    return found


def _memory(node: Node) -> str | Node:
    """Whose memory ``node`` may share: the target of an attribute, or the node that computed it."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        schema = getattr(node.target, "_schema", None)
        shares = schema is not None and any(item.alias_info is not None for item in schema.returns)
        if not shares and node.target not in _MAY_RETURN_INPUT:
            break
        node = node.args[0]
    return str(node.target) if node.op == "get_attr" else node
