"""A sum of parallel linear branches of one value is one convolution (RepVGG, Ding et al. 2021, section 3.3).

A convolution with a smaller kernel, a 1x1 convolution, or the affine of an identity branch fits into the largest kernel of
the sum if its taps read the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnexport.folding.affine import Affine
from bnexport.folding.graph import ConstantAffine, Geometry, Identity, Layer, Op, WeightedSum
from bnexport.folding.layers import channels_of
from bnexport.folding.plan import FoldPlan, Refused

EQUATION = "W' = W + s at the centre tap, b' = b + t"
#: Host -> summands of its weight and of its bias; or Refused.
_Taps = Callable[[Layer], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class _Branch:
    """One operand of a sum: the addition that reads it, the input of its branch, and the operations removed with it.

    The input is the operand itself if the branch has no operation.
    """

    first: Op
    operand: Op
    value: Op
    members: tuple[Op, ...]


def merge_affine(plan: FoldPlan, site: Op, affine: Affine) -> Op:
    """Merge an affine branch into a convolution of the same value in the same sum, and return the convolution."""
    return _merge(plan, _branch_of(site), partial(_affine_taps, affine))


def merge_convolution(plan: FoldPlan, guest: Op) -> Op:
    """Merge a convolution into a parallel convolution whose kernel covers it, and return the latter."""
    layer = guest.kind
    assert isinstance(layer, Layer)
    if layer.weight.readers > 1:
        raise Refused(f"the weight of {guest.name} is shared")
    return _merge(plan, _branch_of(guest), partial(_convolution_taps, layer))


def merge_skip(plan: FoldPlan, total: Op) -> None:
    """Merge a skip connection into a convolution of the same value: ``W x + x = (W + I) x``.

    ``total`` is the value of a sum and has a single reader.
    """
    refusals = [Refused(f"{total.name} is not a sum of a value and its convolution")]
    for add, parent in _edges(total):
        if (isinstance(parent.kind, WeightedSum) and len(parent.users) == 1) or parent.rank < 3:
            continue
        branch, taps = _Branch(add, parent, parent, ()), partial(_affine_taps, Affine.identity(parent.rank))
        if (refused := plan.attempt(partial(_merge, plan, branch, taps))) is None:
            return
        refusals.append(refused)
    raise refusals[-1]


def _edges(total: Op) -> list[tuple[Op, Op]]:
    """Return (addition, operand) of every operand of a tree of additions, each read by the next addition only."""
    found, stack = [], [total]
    while stack:
        op = stack.pop()
        if _passes(op) and len(op.users) == len(op.inputs[0].users) == 1:
            stack.append(op.inputs[0])
        if not isinstance(op.kind, WeightedSum):
            continue
        for parent in op.inputs:
            found.append((op, parent))
            if len(parent.users) == 1:
                stack.append(parent)
    return found


def _branch_of(guest: Op) -> _Branch:
    members, op = [guest], guest
    while len(op.users) == 1 and _passes(op.users[0]):
        op = op.users[0]
        members.append(op)
    if len(op.users) != 1 or not isinstance(op.users[0].kind, WeightedSum):
        raise Refused(f"{guest.name} is not a branch of a sum")
    return _Branch(op.users[0], op, guest.inputs[0], tuple(members))


def _merge(plan: FoldPlan, branch: _Branch, taps: _Taps) -> Op:
    chain = _sum_from(branch.first)
    refusals = []
    for host in _leaves(chain[-1]):
        layer = host.kind
        if not isinstance(layer, Layer) or layer.geometry is None or layer.layout != "rows" or host in branch.members:
            continue
        if host.inputs[0] is not branch.value:
            continue
        try:
            _refuse_broadcast(_sum_path(host, chain[-1]))
            weight, bias = taps(layer)
            sign = _factor(chain, branch.operand) / _factor(_sum_path(host, chain[-1]), host)
            _carry_out(plan, chain, branch, host, weight * sign, None if bias is None else bias * sign)
        except Refused as refused:
            refusals.append(refused)
        else:
            return host
    raise refusals[0] if refusals else Refused("no parallel convolution has a kernel that could hold it")


def _carry_out(plan: FoldPlan, chain: list[Op], branch: _Branch, host: Op, weight: Tensor, bias: Tensor | None) -> None:
    layer = host.kind
    assert isinstance(layer, Layer)
    if layer.weight.readers > 1 or (layer.bias is not None and layer.bias.readers > 1):
        raise Refused(f"the weight of {host.name} is shared")
    if bias is not None and layer.bias is not None:
        bias = bias + layer.bias.load()
    plan.layer(host, layer, weight=layer.weight.load() + weight, bias=bias, after=None)
    for op in (*branch.members, *_sum_path(host, chain[-1]), *chain, host):
        plan.path.setdefault(op)
    plan.edit(branch.first, _without(branch.first, branch.operand))


def _without(op: Op, operand: Op) -> Identity:
    kind = op.kind
    assert isinstance(kind, WeightedSum)
    other = 1 - op.inputs.index(operand)
    if kind.factors[other] != 1 or op.inputs[0] is op.inputs[1]:
        raise Refused(f"{op.name} is not a plain addition")
    return Identity(other)


def _sum_from(first: Op) -> list[Op]:
    """Return the additions and identities from the first to the last of a sum, each the only reader of the one before."""
    chain, op = [first], first
    while len(op.users) == 1 and (isinstance(op.users[0].kind, WeightedSum) or _passes(op.users[0])):
        op = op.users[0]
        chain.append(op)
    while not isinstance(chain[-1].kind, WeightedSum):
        chain.pop()
    _refuse_broadcast(chain)
    return chain


def _refuse_broadcast(path: list[Op]) -> None:
    for op in path:
        if isinstance(op.kind, WeightedSum) and any(parent.shape != op.shape for parent in op.inputs):
            raise Refused(f"{op.name} broadcasts one of its operands")


def _passes(op: Op) -> bool:
    return isinstance(op.kind, Identity) and len(op.inputs) == 1


def _leaves(root: Op) -> list[Op]:
    """Return the operands that only the sum reads, largest weights first."""
    operands = [op for _, op in _edges(root) if len(op.users) == 1]
    leaves = [op for op in operands if not isinstance(op.kind, WeightedSum) and not _passes(op)]
    leaves += [op.inputs[0] for op in operands if _passes(op) and len(op.inputs[0].users) == 1]
    return sorted(leaves, key=_elements, reverse=True)


def _sum_path(op: Op, root: Op) -> list[Op]:
    path = []
    while op is not root:
        op = op.users[0]
        path.append(op)
    return path


def _factor(path: list[Op], op: Op) -> float:
    factor = 1.0
    for user in path:
        if isinstance(user.kind, WeightedSum):
            factor *= user.kind.factors[user.inputs.index(op)]
        op = user
    return factor


def _affine_taps(affine: Affine, host: Layer) -> tuple[Tensor, Tensor | None]:
    geometry = host.geometry
    assert geometry is not None
    inputs, outputs = channels_of(host.layout, host.weight.shape, host.groups)
    vector = affine.channels(1, inputs) if affine.rank == len(geometry.stride) + 2 else None
    if vector is None or inputs != outputs:
        raise Refused("it has other channels than the parallel convolution")
    weight = vector.scale.reshape(inputs, 1, *[1] * len(geometry.stride))
    ones = (1,) * len(geometry.stride)
    bias = vector.shift.clone() if affine.has_shift else None
    return _placed(weight, inputs, Geometry(ones, ones, (0,) * len(ones)), host), bias


def _convolution_taps(guest: Layer, host: Layer) -> tuple[Tensor, Tensor | None]:
    if guest.geometry is None or guest.layout != "rows" or guest.after is not None or host.after is not None:
        raise Refused("it is not a plain convolution")
    if guest.weight.dtype != host.weight.dtype:
        raise Refused("the two convolutions have different element types")
    bias = None if guest.bias is None else guest.bias.load()
    return _placed(guest.weight.load(), guest.groups, guest.geometry, host), bias


def _placed(weight: Tensor, groups: int, geometry: Geometry, host: Layer) -> Tensor:
    """Return a guest's weight (out, in / groups, *kernel) in the layout of the host's weight.

    For output position o, tap i of the guest reads input position ``o * stride - padding + i * dilation``. The host must have
    a tap that reads the same position.
    """
    assert host.geometry is not None
    if geometry.stride != host.geometry.stride:
        raise Refused("the two branches have different strides")
    shape = host.weight.shape
    if shape[0] != weight.shape[0] or shape[1] * host.groups != weight.shape[1] * groups:
        raise Refused("the two branches have different channels")
    taps = [
        _taps_of(weight.shape[2 + axis], geometry, host.geometry, shape[2 + axis], axis)
        for axis in range(len(geometry.stride))
    ]
    weight = _regrouped(weight, groups, host.groups)
    placed = torch.zeros(shape, dtype=torch.float64)
    places: Any = (slice(None), slice(None), *torch.meshgrid(*[torch.tensor(axis) for axis in taps], indexing="ij"))
    placed[places] = weight
    return placed


def _taps_of(kernel: int, guest: Geometry, host: Geometry, room: int, axis: int) -> list[int]:
    found = []
    for tap in range(kernel):
        offset = host.padding[axis] - guest.padding[axis] + tap * guest.dilation[axis]
        place, rest = divmod(offset, host.dilation[axis])
        if rest or not 0 <= place < room:
            raise Refused("the taps of the two branches read different positions")
        found.append(place)
    return found


def _regrouped(weight: Tensor, groups: int, wanted: int) -> Tensor:
    """Return (out, in / groups, ...) as (out, in / wanted, ...), with zeros outside a guest's group."""
    if groups == wanted:
        return weight
    if groups % wanted:
        raise Refused("the groups of the two branches do not fit into each other")
    outputs, width = weight.shape[:2]
    wide = torch.zeros(outputs, width * groups // wanted, *weight.shape[2:], dtype=weight.dtype)
    for output in range(outputs):
        group = output // (outputs // groups)
        start = (group % (groups // wanted)) * width
        wide[output, start : start + width] = weight[output]
    return wide


def sum_guests(ops: Sequence[Op], touched: Collection[Op]) -> list[Op]:
    """Return the convolutions in a sum among the operations that folds have changed, smallest weights first."""
    found = [
        op
        for op in ops
        if op in touched
        and isinstance(op.kind, Layer)
        and op.kind.geometry is not None
        and len(op.users) == 1
        and not isinstance(op.users[0].kind, ConstantAffine)
    ]
    return sorted(found, key=_elements)


def _elements(op: Op) -> int:
    return op.kind.weight.elements if isinstance(op.kind, Layer) else 0
