"""Which values of a graph are constants, and what they are in float64."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bnexport.folding.aliasing import memory_of

aten = torch.ops.aten

#: Casts to a wider floating type inside a constant are skipped, so that the constant keeps its float64 precision. One that
#: rounds (to float16, to an integer) is part of what the network computes.
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)
#: Operators that cut a constant into pieces, which getitem takes.
_CUTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)


class Constants:
    """Values that depend on parameters, buffers and literals alone, computed in float64 when asked for.

    A parameter or buffer that some operator of the graph changes in place (also through a view) is not a constant: what
    it holds depends on when it is read.

    Attributes:
        mutated: What some operator changes in place: targets of attributes, and computed nodes.
    """

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._values: dict[Node, Tensor | tuple[Tensor, ...] | None] = {}
        self.mutated = set(_mutated_memory(module))

    def changes(self, *nodes: Node) -> bool:
        """Whether the memory of some value is changed in place, so that it matters when it is read."""
        return bool(self.mutated) and any(not self.mutated.isdisjoint(memory_of(node)) for node in nodes)

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
        found = self._values[node]
        return found if isinstance(found, Tensor) else None

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

    def _compute(self, node: Node) -> Tensor | tuple[Tensor, ...] | None:
        if self.changes(node):
            return None
        if node.op == "get_attr":
            value = attribute(self._module, str(node.target))
            return value.detach() if isinstance(value, Tensor) else None
        parents = node.all_input_nodes
        if node.op != "call_function" or not _is_pure(node) or not parents:
            return None
        if any(self._values[parent] is None for parent in parents):
            return None
        if node.target in _CASTS and isinstance(node.args[0], Node) and _widens(node):
            return self._values[node.args[0]]
        for look_up in (self._wide_value, self._narrow_value)[_looks_at_bits(node) :]:
            try:
                with torch.no_grad():
                    args: Any = torch.fx.map_arg(node.args, look_up)
                    kwargs: Any = torch.fx.map_arg(node.kwargs, look_up)
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError, NotImplementedError):
                continue  # an operator for float32 alone, such as those of quantisation
            if node.target in _CUTS:
                return tuple(_wide(item) for item in result)
            if isinstance(result, Tensor) and _fits(result, node):
                return result if result.is_quantized else _wide(result)
        return None

    def _wide_value(self, node: Node) -> Any:
        value = self._values[node]
        return _wide(value) if isinstance(value, Tensor) else value

    def _narrow_value(self, node: Node) -> Any:
        """In the element type that the network computes it in."""
        value, traced = self._values[node], node.meta.get("val")
        if not isinstance(value, Tensor) or not isinstance(traced, Tensor) or not value.is_floating_point():
            return value
        return value.cpu().to(traced.dtype)


def _wide(value: Tensor) -> Tensor:
    """In float64 on the CPU, wherever the network is: the algebra is small, and one device knows no mix-ups."""
    if value.is_quantized:
        return value
    value = value.cpu()
    return value.double() if value.is_floating_point() else value


def _looks_at_bits(node: Node) -> bool:
    """Whether an operator's result depends on the element type itself, so that widening would change it."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return node.target is aten.view.dtype or any(part in name for part in ("quantize", "bitwise", "frexp", "nextafter"))


def _fits(result: Tensor, node: Node) -> bool:
    traced = node.meta.get("val")
    return not isinstance(traced, Tensor) or tuple(result.shape) == tuple(traced.shape)


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
        return node.target is operator.getitem
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
            for item in _nodes(given):
                yield from memory_of(item)
    # Training-mode batch_norm changes its statistics without saying so in its schema.
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is aten.batch_norm.default and node.args[5]:
            for item in node.args[3:5]:
                if isinstance(item, Node):
                    yield from memory_of(item)


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(value, found.append)
    return found
