"""The names that the graph of an ONNX file reads, and its used names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """Return the graphs in a node's attributes."""
    found: list[GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == attribute.GRAPH:
            found.append(attribute.g)
        found += attribute.graphs
    return found


def graphs_within(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """Yield every graph inside some nodes, at any depth."""
    for node in nodes:
        for graph in subgraphs(node):
            yield graph
            yield from graphs_within(graph.node)


def mentioned_inside(node: NodeProto) -> list[str]:
    """Return every name that the graphs inside a node read or return; outer values are among them."""
    found: list[str] = []
    for graph in graphs_within([node]):
        found += [value.name for value in graph.output]
        found += [name for inner in graph.node for name in inner.input if name]
    return found


def reads(node: NodeProto) -> list[str]:
    """Return every name that a node reads, once per reading, those inside its graphs too."""
    return [*(name for name in node.input if name), *mentioned_inside(node)]


def mentions(graph: GraphProto) -> Counter[str]:
    """Count how often each name is read: by nodes, by the graphs inside them, as an output of the graph."""
    count: Counter[str] = Counter(value.name for value in graph.output)
    for node in graph.node:
        count.update(reads(node))
    return count


class Names:
    """Creates names that a model does not use."""

    def __init__(self, model: ModelProto) -> None:
        self._taken: set[str] = set()
        inner = [graph for owner in (model.graph, *model.functions) for graph in graphs_within(owner.node)]
        for graph in (model.graph, *inner):
            for group in (graph.input, graph.output, graph.initializer, graph.value_info):
                self._taken.update(item.name for item in group)
        for owner in (model.graph, *inner, *model.functions):
            for node in owner.node:
                self._taken.update([node.name, *node.input, *node.output])

    def free(self, *parts: str) -> str:
        """Return the parts joined by "_", with a number if that name is used."""
        wanted = "_".join(parts)
        name, number = wanted, 1
        while name in self._taken:
            name, number = f"{wanted}_{number}", number + 1
        self._taken.add(name)
        return name
