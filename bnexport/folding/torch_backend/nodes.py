"""Nodes of a torch.export graph: their names in messages, shapes, arguments, and the result of reading one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bnexport.folding.affine import Affine
from bnexport.folding.graph import Kind, Weight
from bnexport.folding.torch_backend.torch_constants import TorchConstants, attribute

#: The operator that is a BatchNorm; each call has a separate row in the fold report.
BATCH_NORM = torch.ops.aten.batch_norm.default


def shape_of(node: object) -> tuple[int | None, ...] | None:
    """Return a value's traced shape, with None for a dimension that varies; None if it is not a tensor.

    A symbolic size is never compared with a number, because torch would then pin the size to that number.
    """
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor):
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def dtype_of(node: object) -> torch.dtype | None:
    """Return a value's traced element type; None if it is not a tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def module_path(node: Node) -> str:
    """Return the path of the innermost module that a node was traced in; "" for the root."""
    return module_stack(node)[-1][1]


def module_class(node: Node) -> str:
    """Return the class name of the innermost module that a node was traced in; the operator's name in the root module."""
    _, path, qualified = module_stack(node)[-1]
    return qualified.rpartition(".")[2] if path else operator_name(node)


def describe(node: Node) -> str:
    """Return a node's name in messages: operator and module."""
    if node.op == "placeholder":
        return f"the model's input {node.name!r}"
    path = module_path(node)
    return f"{operator_name(node)} ({path})" if path else operator_name(node)


def operator_name(node: Node) -> str:
    """``aten.conv2d.default`` -> "conv2d"; a Python operator's own name."""
    schema = getattr(node.target, "_schema", None)
    return str(getattr(node.target, "__name__", node.target)) if schema is None else schema.name.rpartition("::")[2]


def module_stack(node: Node) -> list[tuple[str, str, str]]:
    """Return (key, path, class) of each module from the root inwards. A second call of a module has another key."""
    stack = node.meta.get("nn_module_stack") or {}
    found = [(str(key), str(path), str(kind)) for key, (path, kind) in stack.items()]
    return found or [("", "", "")]


def channels_of(value: Node, axis: int | None, affine: Affine | None) -> int:
    """Return the number of channels of a norm's input; 0 if the axis is not fixed."""
    shape = shape_of(value)
    if shape is None or axis is None or axis >= len(shape):
        return 0 if affine is None else max(affine.scale.shape, default=1)
    return shape[axis] or 0


def batch_norm_nodes(graph_module: GraphModule) -> Iterator[Node]:
    """Return the batch_norm operators of a graph, and of the graphs inside it (branches, regions under autocast)."""
    graphs = (module.graph for module in graph_module.modules() if isinstance(module, GraphModule))
    return (node for graph in graphs for node in graph.find_nodes(op="call_function", target=BATCH_NORM))


#: Part of the name of an operator that runs a graph -> the name of that region in messages.
_REGIONS = (
    ("cond", "a branch (torch.cond)"),
    ("autocast", "a region with another autocast mode"),
    ("set_grad_enabled", "a region with another gradient mode"),
    ("", "a region of forward"),
)


def region_of(node: Node, root: GraphModule) -> str:
    """Return the name of the region of forward whose separate graph contains a node."""
    names = [""]
    for module in root.modules():
        for holder in module.graph.find_nodes(op="get_attr") if isinstance(module, GraphModule) else ():
            if attribute(module, str(holder.target)) is node.graph.owning_module:
                names += [str(getattr(user.target, "_name", user.target)) for user in holder.users]
    return next(words for part, words in _REGIONS for name in names if part in name)


class Surroundings(Protocol):
    """The interface of the graph that a reader may use."""

    constants: TorchConstants

    def weight(self, node: Any) -> Weight | None:
        """Return the stored tensor of a node; None if it is not a constant."""
        ...


@dataclass(frozen=True)
class TorchReading:
    """The result of reading a node: its kind, the values it reads, and the argument positions of weight and bias."""

    kind: Kind
    inputs: tuple[Any, ...]
    weight: int | None = None
    bias: int | None = None


#: Reads a node. The result is None if no kind fits, or a sentence if there is a more specific reason.
NodeReader = Callable[[Node, Surroundings], TorchReading | str | None]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument by position or name, as the operator's schema allows both."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)
