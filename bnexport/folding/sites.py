"""Graph facts: where the affines are, which layer feeds each, and who else looks at the values between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from bnexport.folding.absorb import ABSORBERS, Absorber
from bnexport.folding.affine import READERS, AffineStep, ChannelAffine, shape_of
from bnexport.folding.constants import Constants

aten = torch.ops.aten

#: The one operator that is a BatchNorm by itself; each call of it has a row of its own in the report.
BATCH_NORM = aten.batch_norm.default
#: Operators that hand on their input unchanged. Dropout belongs here only when its ``train`` argument is false.
_IDENTITIES = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


@dataclass
class Site:
    """One BatchNorm-like call and what stands before it.

    Attributes:
        graph_module: The module that holds the graph.
        constants: Its constants.
        nodes: The nodes of the affine, in order; the first takes ``value``, the last is the result.
        value: What the affine is applied to.
        affine: What it does, or None when it can't be read.
        axis: Channel axis of ``value``; None when every channel gets the same scale and shift.
        why_not: Why the affine can't be read.
        producer: The first node above ``value`` that does more than hand on its input.
        between: The nodes from the producer's user to ``value``, all identities.
    """

    graph_module: GraphModule
    constants: Constants
    nodes: tuple[Node, ...]
    value: Node
    affine: ChannelAffine | None
    axis: int | None
    why_not: str | None = None
    producer: Node = field(init=False)
    between: tuple[Node, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.locate()

    def locate(self) -> None:
        """Find the producer anew: an earlier fold may have removed a node above."""
        value = self.nodes[0].args[_value_position(self.nodes[0], self.constants)]
        assert isinstance(value, Node)
        self.value, between = value, []
        while is_identity(value):
            between.append(value)
            above = value.args[0]
            assert isinstance(above, Node)
            value = above
        self.producer, self.between = value, tuple(reversed(between))

    @property
    def absorber(self) -> Absorber | None:
        """How the producer takes in an affine; None when it is not a linear layer."""
        return ABSORBERS.get(self.producer.target) if self.producer.op == "call_function" else None

    @property
    def result(self) -> Node:
        """The node whose value is the affine's result."""
        return self.nodes[-1]

    @property
    def module_path(self) -> str:
        """Path of the module that the BatchNorm is, as the user's ``named_modules`` spells it."""
        return module_path(self.result)

    @property
    def kind(self) -> str:
        """The BatchNorm's class, without its package; the operator's name when no module stands for it."""
        return module_class(self.result)


def find_sites(graph_module: GraphModule, constants: Constants) -> list[Site]:
    """Every BatchNorm-like call in the graph's order, each node in one site at most."""
    taken: set[Node] = set()
    sites = []
    for node in list(graph_module.graph.nodes):
        if node in taken or (step := read_step(node, constants)) is None:
            continue
        if node.target is BATCH_NORM:
            site = Site(graph_module, constants, (node,), step.value, step.affine, step.axis, step.why_not)
        else:
            chain = _elementwise_chain(node, step, constants)
            if not _is_norm([node for node, _ in chain], constants):
                continue
            nodes = tuple(node for node, _ in chain)
            affine, axis = _compose([step for _, step in chain])
            site = Site(graph_module, constants, nodes, step.value, affine, axis)
        taken.update(site.nodes)
        sites.append(site)
    return sites


def read_step(node: Node, constants: Constants) -> AffineStep | None:
    """Read one node by the table of readers; None when it is no affine, or is itself a constant."""
    reader = READERS.get(node.target) if node.op == "call_function" else None
    return None if reader is None else reader(node, constants)


def is_identity(node: Node) -> bool:
    """Whether a node hands on its input unchanged (dropout in eval mode, clone, contiguous, detach)."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in _DROPOUTS:
        return node.args[2] is False
    return node.target in _IDENTITIES


def module_path(node: Node) -> str:
    """Path of the innermost module that a node was traced in; "" for the root."""
    return _module_stack(node)[-1][1]


def module_class(node: Node) -> str:
    """Class name of the innermost module that a node was traced in; the operator's name in the root module."""
    path, qualified = _module_stack(node)[-1][1:]
    if not path:
        return operator_name(node)
    return qualified.rpartition(".")[2]


def describe(node: Node) -> str:
    """A node in a sentence: its operator and module."""
    if node.op == "placeholder":
        return f"the model's input {node.name!r}"
    path = module_path(node)
    return f"{operator_name(node)} ({path})" if path else operator_name(node)


def operator_name(node: Node) -> str:
    """``aten.conv2d.default`` -> "conv2d"; a Python operator's own name."""
    schema = getattr(node.target, "_schema", None)
    return str(getattr(node.target, "__name__", node.target)) if schema is None else schema.name.rpartition("::")[2]


def _elementwise_chain(node: Node, step: AffineStep, constants: Constants) -> list[tuple[Node, AffineStep]]:
    """The run of elementwise affines that starts at ``node``, within one call of one module, without other readers."""
    chain = [(node, step)]
    while len(node.users) == 1:
        (user,) = node.users
        following = read_step(user, constants)
        if user.target is BATCH_NORM or following is None or following.value is not node:
            break
        if _module_stack(user)[-1] != _module_stack(node)[-1] or not _axes_agree(chain, following):
            break
        chain.append((user, following))
        node = user
    return chain


def _axes_agree(chain: list[tuple[Node, AffineStep]], following: AffineStep) -> bool:
    axes = {step.axis for _, step in chain} | {following.axis}
    return len(axes - {None}) <= 1


def _is_norm(nodes: list[Node], constants: Constants) -> bool:
    """Scale and shift by stored constants: a norm written out. A lone ``x * 2`` or ``x + bias`` is not one."""
    names = {operator_name(node) for node in nodes}
    stored = any(constants.value(parent) is not None for node in nodes for parent in node.all_input_nodes)
    return stored and bool(names & {"mul", "div", "truediv"}) and bool(names & {"add", "sub"})


def _compose(steps: list[AffineStep]) -> tuple[ChannelAffine, int | None]:
    affine: ChannelAffine | None = None
    for step in steps:
        assert step.affine is not None
        affine = step.affine if affine is None else step.affine.after(affine)
    assert affine is not None
    return affine, next((step.axis for step in steps if step.axis is not None), None)


def _value_position(node: Node, constants: Constants) -> int:
    """Which argument is the value: an elementwise affine may have its constant first."""
    if node.target is BATCH_NORM:
        return 0
    return 0 if constants.value(node.args[0]) is None else 1


def _module_stack(node: Node) -> list[tuple[str, str, str]]:
    """(key, path, class) from the root inwards. A second call of one module has another key."""
    stack = node.meta.get("nn_module_stack") or {}
    found = [(str(key), str(path), str(kind)) for key, (path, kind) in stack.items()]
    return found or [("", "", "")]


def channels_of(site: Site) -> int | None:
    """Number of channels that the site's value has; None when the axis is not fixed."""
    shape = shape_of(site.value)
    if shape is None or site.axis is None or site.axis >= len(shape):
        return None if site.affine is None else site.affine.channels
    return shape[site.axis]


def batch_norm_nodes(graph_module: GraphModule) -> Iterator[Node]:
    """The batch_norm operators of a graph, and of the graphs inside it (branches, regions under autocast)."""
    graphs = (module.graph for module in graph_module.modules() if isinstance(module, GraphModule))
    return (node for graph in graphs for node in graph.find_nodes(op="call_function", target=BATCH_NORM))
