"""What a reader of ATen operators gives, and how arguments are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch.fx import Node

from bnexport.folding.graph import Kind, Weight
from bnexport.folding.torch_backend.constants import Constants


class Surroundings(Protocol):
    """What a reader may ask of the graph around a node."""

    constants: Constants

    def weight(self, node: Any) -> Weight | None:
        """The stored tensor that a node stands for; None when it is no constant."""
        ...


@dataclass(frozen=True)
class Reading:
    """What a node is.

    Attributes:
        kind: What it computes.
        inputs: The values it reads.
        weight: Position of a layer's weight among the arguments.
        bias: Position of its bias.
    """

    kind: Kind
    inputs: tuple[Any, ...]
    weight: int | None = None
    bias: int | None = None


#: Reads a node; None for what has no kind, a sentence for why not when there is more to say.
Reader = Callable[[Node, Surroundings], Reading | str | None]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name, as the operator's schema allows both."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)
