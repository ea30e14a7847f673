"""Tensors that a traced network creates in forward are on the device of its input, wherever the network was traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree


def follow_input(module: GraphModule) -> None:
    """Replace each device that a graph names by the device of the graph's first tensor, in place.

    torch.export writes the device of tracing into factories and casts: ``torch.zeros(n, device=x.device)`` of a network that
    is on the CPU becomes ``zeros(n, device="cpu")``, which fails as soon as the folded network is moved.
    """
    for part in module.modules():
        if isinstance(part, GraphModule):
            _follow(part)


def _follow(part: GraphModule) -> None:
    graph = part.graph
    inputs = graph.find_nodes(op="placeholder")
    first = next((node for node in inputs if isinstance(node.meta.get("val"), Tensor)), None)
    naming = [node for node in graph.nodes if node.op == "call_function" and _names_device((node.args, node.kwargs))]
    if first is None or not naming:
        return
    with graph.inserting_after(inputs[-1]):
        device = graph.call_function(getattr, (first, "device"))

    def followed(item: Any) -> Any:
        return device if isinstance(item, torch.device) else item

    for node in naming:
        node.args, node.kwargs = map_aggregate(node.args, followed), map_aggregate(node.kwargs, followed)
    part.recompile()


def _names_device(arguments: Any) -> bool:
    return any(isinstance(item, torch.device) for item in pytree.tree_leaves(arguments))
