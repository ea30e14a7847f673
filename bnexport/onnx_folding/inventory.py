"""What a file holds: who mentions which name, which names are taken, where its batch norms are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from onnx import GraphProto, ModelProto, NodeProto

from bnexport.runtimes.onnx_file import graphs, nodes

BATCH_NORM = "BatchNormalization"
_DEFAULT_DOMAIN = ("", "ai.onnx")


def opset_of(model: ModelProto) -> int:
    """Version of the default operator set; 0 when the file imports none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def label(node: NodeProto) -> str:
    """What a node is called in the account: its name, or that of its first output."""
    return node.name or next((name for name in node.output if name), node.op_type)


def is_default(node: NodeProto) -> bool:
    """Whether an operator is ONNX's own."""
    return node.domain in _DEFAULT_DOMAIN


def is_batch_norm(node: NodeProto) -> bool:
    """Whether a node has a row in the account."""
    return node.op_type == BATCH_NORM and is_default(node)


def count_batch_norms(model: ModelProto) -> int:
    """BatchNormalization nodes of all graphs and functions."""
    return sum(map(is_batch_norm, nodes(model)))


def inner_batch_norms(model: ModelProto) -> Iterator[tuple[NodeProto, str]]:
    """Each BatchNormalization outside the main graph, and where it is, as the end of a sentence."""
    for node in _inside(model.graph.node):
        if is_batch_norm(node):
            yield node, "the body of an If, Loop or Scan"
    for function in model.functions:
        for node in (*function.node, *_inside(function.node)):
            if is_batch_norm(node):
                yield node, f"the body of the function {function.name}"


def _inside(group: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in group:
        for graph in subgraphs(node):
            yield from graph.node
            yield from _inside(graph.node)


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The graphs that a node carries as attributes."""
    found: list[GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == attribute.GRAPH:
            found.append(attribute.g)
        found += attribute.graphs
    return found


def mentioned_inside(node: NodeProto) -> list[str]:
    """Every name that the graphs inside a node read or give: among them are the outer values that they read."""
    found: list[str] = []
    for graph in subgraphs(node):
        found += [value.name for value in graph.output]
        for inner in graph.node:
            found += [name for name in inner.input if name]
            found += mentioned_inside(inner)
    return found


def mentions(graph: GraphProto) -> Counter[str]:
    """How often each name is read: by nodes, by the graphs inside them, as an output of the graph."""
    count: Counter[str] = Counter(value.name for value in graph.output)
    for node in graph.node:
        count.update(reads(node))
    return count


def reads(node: NodeProto) -> list[str]:
    """Every name that a node reads, once per reading, those inside its graphs too."""
    return [*(name for name in node.input if name), *mentioned_inside(node)]


def pinned(graph: GraphProto) -> set[str]:
    """Names that must stay: the graph's outputs, and what graphs inside nodes mention."""
    inside = (name for node in graph.node for name in mentioned_inside(node))
    return {*(value.name for value in graph.output), *inside}


class Names:
    """Gives names that nothing in a model has.

    Args:
        model: Its names are taken.
    """

    def __init__(self, model: ModelProto) -> None:
        self._taken: set[str] = set()
        for graph in graphs(model):
            for group in (graph.input, graph.output, graph.initializer, graph.value_info):
                self._taken.update(item.name for item in group)
        for node in nodes(model):
            self._taken.update([node.name, *node.input, *node.output])

    def free(self, *parts: str) -> str:
        """The parts joined by "_", with a number where that is taken."""
        wanted = "_".join(parts)
        name, number = wanted, 1
        while name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name
