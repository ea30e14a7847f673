"""Readers of norms: every scale and shift by constants in a graph of torch.export."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from bnexport.folding.affine import Affine, ChannelAffine, arithmetic, is_finite, placed_on, why_infinite
from bnexport.folding.torch_backend.nodes import BATCH_NORM, argument, dtype_of, module_stack, operator_name, shape_of
from bnexport.folding.torch_backend.torch_constants import TorchConstants
from bnexport.nn.statistics import VOCABULARIES

aten = torch.ops.aten


@dataclass(frozen=True)
class NormReading:
    """One scale and shift, in one node or several; the last three fields are those of ``NormCall``."""

    nodes: tuple[Node, ...]  # The nodes in order; the first reads ``value``, the last has the result
    value: Node
    affine: Affine | None  # None if the affine can't be read, for the reason ``why_not``
    # Channel axis of ``value``; None if the affine is the same for every element, or varies along several axes
    axis: int | None
    counts: bool  # True for a BatchNorm, also one written as arithmetic; False for other arithmetic
    why_not: str = ""
    hint: str = ""
    offset: float = 0.0


NormReader = Callable[[Node, TorchConstants], NormReading | None]


def read_norms(module: GraphModule, constants: TorchConstants) -> dict[Node, NormReading]:
    """Return every norm of a graph, under each of its nodes; each node belongs to one norm at most."""
    found: dict[Node, NormReading] = {}
    for node in module.graph.nodes:
        if node in found or (reading := read_node(node, constants)) is None:
            continue
        if node.target is not BATCH_NORM:
            reading = _chain(reading, constants)
        reading = _typed(reading)
        if reading.counts or not reading.why_not:
            found.update(dict.fromkeys(reading.nodes, reading))
    return found


def read_node(node: Node, constants: TorchConstants) -> NormReading | None:
    """Read one node by the table of readers; None if it is not an affine, or is a constant."""
    reader = NORM_READERS.get(node.target) if node.op == "call_function" else None
    if reader is None or not isinstance(node.meta.get("val"), Tensor):
        return None
    return reader(node, constants)


def _batch_norm(node: Node, constants: TorchConstants) -> NormReading | None:
    """Read ``aten.batch_norm``: nn.BatchNorm1d/2d/3d, SyncBatchNorm in eval mode, F.batch_norm, any subclass."""
    value, gamma, beta, mean, var, training = node.args[:6]
    eps = float(node.args[7])  # type: ignore[arg-type]
    shape = shape_of(value)
    if not isinstance(value, Node) or shape is None:
        return None

    def unread(why: str, hint: str) -> NormReading:
        return NormReading((node,), value, None, 1, True, why, hint)

    if mean is None or var is None:
        why = "it has no moving statistics (as with track_running_stats=False), so it uses batch statistics"
        return unread(why, "track_running_stats=True, and training with it")
    if training:
        why = "it is in training mode, so it uses batch statistics"
        return unread(why, "eval() on it; where forward calls a function, training=False in the call")
    scale, shift, middle, spread = (constants.value(item) for item in (gamma, beta, mean, var))
    missing = (gamma is not None and scale is None) or (beta is not None and shift is None)
    if missing or middle is None or spread is None:
        why = f"its statistics or parameters are {constants.why_not(gamma, beta, mean, var)}"
        return unread(why, "statistics and parameters that forward does not change")
    affine = ChannelAffine.from_statistics(middle, spread, eps, scale, shift)
    if not is_finite(affine):
        return unread(*why_infinite(spread, eps))
    offset = float((middle.abs() * torch.rsqrt(spread + eps)).max())
    return NormReading((node,), value, affine.on_axis(1, len(shape)), 1, True, offset=offset)


def _elementwise(node: Node, constants: TorchConstants) -> NormReading | None:
    """Read ``x + c``, ``x - c``, ``c - x``, ``x * c`` or ``x / c`` with a constant that does not enlarge the value."""
    left, right = node.args[:2]
    alpha = float(argument(node, 2, "alpha", 1))  # only rsub.Scalar has it as a positional argument
    left_constant, right_constant = constants.value(left), constants.value(right)
    if (left_constant is None) == (right_constant is None):
        return None
    value, constant = (left, right_constant) if left_constant is None else (right, left_constant)
    if not isinstance(value, Node) or constant is None or not constant.is_floating_point():
        return None
    shape = shape_of(value)
    if shape is None or (placed := placed_on(constant, shape)) is None:
        return None
    name, first = _ELEMENTWISE[node.target], left_constant is not None
    if name == "rsub":
        name, first = "sub", not first
    affine = arithmetic(name, placed, first=first, factor=alpha)
    return None if affine is None or not is_finite(affine) else _plain(node, value, affine)


def _addcmul(node: Node, constants: TorchConstants) -> NormReading | None:
    """Read ``addcmul(t, x, s)``: a shift and a scale in one operator."""
    shift, *factors = node.args[:3]
    factor = float(node.kwargs.get("value", 1))  # type: ignore[arg-type]
    values = [item for item in factors if isinstance(item, Node) and constants.value(item) is None]
    shape = shape_of(values[0]) if len(values) == 1 else None
    stored = [constants.value(item) for item in (shift, *(item for item in factors if item not in values))]
    if shape is None or len(stored) != 2 or stored[0] is None or stored[1] is None:
        return None
    placed_shift, placed_scale = placed_on(stored[0], shape), placed_on(stored[1], shape)
    if placed_shift is None or placed_scale is None:
        return None
    return _plain(node, values[0], Affine.of(factor * placed_scale, placed_shift))


def _neg(node: Node, constants: TorchConstants) -> NormReading | None:
    value = node.args[0]
    if not isinstance(value, Node) or constants.value(value) is not None or (shape := shape_of(value)) is None:
        return None
    identity = Affine.identity(len(shape))
    return _plain(node, value, Affine.of(-identity.scale, identity.shift))


def _plain(node: Node, value: Node, affine: Affine) -> NormReading:
    varying = affine.varying
    return NormReading((node,), value, affine, varying[0] if len(varying) == 1 else None, False)


_ELEMENTWISE: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.rsub.Scalar: "rsub",
    aten.rsub.Tensor: "rsub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
}

#: Operator -> reader. A new norm is a new row.
NORM_READERS: dict[Any, NormReader] = {
    BATCH_NORM: _batch_norm,
    aten.addcmul.default: _addcmul,
    aten.neg.default: _neg,
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
}


def _chain(first: NormReading, constants: TorchConstants) -> NormReading:
    """Read the run of arithmetic that starts here, within one call of one module and without other readers, as one norm.

    The run is a norm if it varies along one axis at most, and has a stored scale and a shift, or reads moving statistics:
    a bias-free denoiser only divides by the deviation, a mean-only BatchNorm only subtracts the mean. A single ``x * 2`` or
    ``x + bias`` is not a norm, nor are the scale and the table of positions of an attention.
    """
    links = [first]
    node = first.nodes[0]
    while len(node.users) == 1:
        (user,) = node.users
        following = read_node(user, constants) if user.target is not BATCH_NORM else None
        if following is None or following.value is not node or module_stack(user)[-1] != module_stack(node)[-1]:
            break
        links.append(following)
        node = user
    nodes = tuple(link.nodes[0] for link in links)
    of_statistics = _reads_statistics(nodes, constants)
    if len(links) == 1 and first.nodes[0].target is not aten.addcmul.default and not of_statistics:
        return first
    affine = first.affine
    for link in links[1:]:
        assert affine is not None
        assert link.affine is not None
        affine = link.affine.after(affine)
    assert affine is not None
    varying = affine.varying
    counts = len(varying) <= 1 and (of_statistics or _has_scale_and_shift(nodes, constants))
    return NormReading(nodes, first.value, affine, varying[0] if len(varying) == 1 else None, counts)


#: Last part of the names of moving statistics, and the operators that compute a deviation from a variance.
_STATISTICS = {name for names in VOCABULARIES for name in names[2:]} | {"running_std", "moving_std"}
_ROOTS = {"sqrt", "rsqrt", "pow"}
#: Operators with which a norm computes its scale and shift from stored vectors.
_VECTORS = {
    *_ROOTS,
    *("add", "sub", "rsub", "mul", "div", "truediv", "neg", "reciprocal", "clamp", "clamp_min", "maximum", "getitem"),
    *("view", "reshape", "unsqueeze", "squeeze", "flatten", "expand", "permute", "transpose", "slice", "select"),
    *("_to_copy", "to", "detach", "clone", "contiguous", "alias"),
}


def _reads_statistics(nodes: tuple[Node, ...], constants: TorchConstants) -> bool:
    """Return True if a constant of the nodes is computed from a moving mean or variance, or is a root of stored numbers."""
    stack: list[tuple[Node, bool]] = [
        (item, False) for node in nodes for item in node.all_input_nodes if constants.known(item)
    ]
    seen = set(stack)
    while stack:
        item, rooted = stack.pop()
        if item.op == "get_attr" and (rooted or str(item.target).rpartition(".")[2] in _STATISTICS):
            return True
        rooted = rooted or operator_name(item) in _ROOTS
        for parent in item.all_input_nodes if operator_name(item) in _VECTORS else ():
            if (parent, rooted) not in seen:
                seen.add((parent, rooted))
                stack.append((parent, rooted))
    return False


def _has_scale_and_shift(nodes: tuple[Node, ...], constants: TorchConstants) -> bool:
    scales = [node for node in nodes if operator_name(node) in ("mul", "div", "truediv", "addcmul")]
    stored = any(constants.known(parent) for node in scales for parent in node.all_input_nodes)
    return stored and any(operator_name(node) in ("add", "sub", "rsub", "addcmul") for node in nodes)


def _typed(reading: NormReading) -> NormReading:
    """Mark a norm that changes the element type as unreadable: a fold would lose that conversion."""
    before, after = dtype_of(reading.value), dtype_of(reading.nodes[-1])
    if before == after and before is not None and before.is_floating_point:
        return reading
    why = f"it converts {before} to {after}, and a fold would lose that conversion"
    return replace(reading, affine=None, why_not=why, hint="one element type in the whole network", offset=0.0)
