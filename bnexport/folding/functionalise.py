"""In-place operators replaced by their functional twins where nobody else can see the difference.

``torch.export`` keeps ``relu_`` and ``add_`` as the network's author wrote them. Where the changed memory belongs to one value
alone, ``relu`` computes the same; elsewhere the operator stays, and folding keeps away from what it changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bnexport.folding.aliasing import shares_memory


def functionalise(graph_module: GraphModule) -> None:
    """Replace in-place operators, in one pass over the graph, where that is exact."""
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        twin = _functional(node)
        if twin is not None and _owned(node, order):
            node.target = twin
    graph_module.recompile()


def _functional(node: Node) -> Any:
    """``aten.relu_.default`` -> ``aten.relu.default``; None for anything else, and where the twin would give another type."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    name = schema.name.removeprefix("aten::")
    if not schema.is_mutable or not name.endswith("_") or name.startswith("_") or not node.args:
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    twin = getattr(packet, node.target._overloadname, None)
    value, types = node.meta.get("val"), {_type(item) for item in node.all_input_nodes}
    if twin is None or not isinstance(value, Tensor) or types - {None} != {(value.dtype, value.device)}:
        return None
    first = node.args[0]
    before = first.meta.get("val") if isinstance(first, Node) else None
    return twin if isinstance(before, Tensor) and before.shape == value.shape else None


def _type(node: Node) -> tuple[torch.dtype, torch.device] | None:
    value = node.meta.get("val")
    return (value.dtype, value.device) if isinstance(value, Tensor) else None


def _owned(node: Node, order: dict[Node, int]) -> bool:
    """Whether the memory that a node changes is seen by nobody else: not before through a view, not after at all."""
    reader, value = node, node.args[0]
    while isinstance(value, Node):
        if value.op != "call_function":
            return False  # an input of the network, or a parameter
        if any(user is not reader and (order[user] > order[node] or shares_memory(user)) for user in value.users):
            return False
        if not shares_memory(value):
            return True
        tensors = [item for item in value.all_input_nodes if isinstance(item.meta.get("val"), Tensor | list | tuple)]
        if len(value.users) > 1 or len(tensors) != 1:
            return False
        reader, value = value, tensors[0]
    return False
