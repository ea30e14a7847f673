"""How an affine crosses what only changes the layout of a value, and what joins or cuts values."""

from __future__ import annotations

import torch
from torch import Tensor

from bnexport.folding.affine import Affine
from bnexport.folding.graph import Add, Concat, Identity, Multiply, Op, Permute, PixelShuffle, Reorder, Reshape, Slice
from bnexport.folding.moves_common import refuse_varying, size_along
from bnexport.folding.plan import Plan, Refused


def pull_identity(plan: Plan, op: Op, kind: Identity, affine: Affine) -> None:
    """The value that is handed on."""
    plan.pull(op.inputs[kind.index], affine, op)


def push_identity(plan: Plan, op: Op, kind: Identity, index: int, affine: Affine) -> None:
    """The readers of what is handed on; an operand that is not handed on does not matter."""
    if index == kind.index:
        plan.push(op, affine)


def pull_reshape(plan: Plan, op: Op, _kind: Reshape, affine: Affine) -> None:
    """The same affine in the shape before."""
    plan.pull(op.inputs[0], _reshaped(op, affine, backward=True), op)


def push_reshape(plan: Plan, op: Op, _kind: Reshape, _index: int, affine: Affine) -> None:
    """The same affine in the shape after."""
    plan.push(op, _reshaped(op, affine, backward=False))


def _reshaped(op: Op, affine: Affine, *, backward: bool) -> Affine:
    shapes = op.inputs[0].shape, op.shape
    found = affine.reshaped(*(reversed(shapes) if backward else shapes))
    if found is None:
        raise Refused(f"{op.name} merges its channels with an axis whose size varies")
    return found


def pull_permute(plan: Plan, op: Op, kind: Permute, affine: Affine) -> None:
    """The same affine, its axes put back."""
    inverse = [kind.axes.index(axis) for axis in range(len(kind.axes))]
    plan.pull(op.inputs[0], affine.mapped(lambda tensor: tensor.permute(inverse)), op)


def push_permute(plan: Plan, op: Op, kind: Permute, _index: int, affine: Affine) -> None:
    """The same affine, its axes permuted."""
    plan.push(op, affine.mapped(lambda tensor: tensor.permute(kind.axes)))


def pull_reorder(plan: Plan, op: Op, kind: Reorder, affine: Affine) -> None:
    """The same affine, its positions put back."""
    if not affine.varies_along(kind.axis):
        return plan.pull(op.inputs[0], affine, op)
    if sorted(kind.index) != list(range(size_along(op.inputs[0], kind.axis))):
        raise Refused(f"{op.name} takes some channels more than once or not at all")
    inverse = torch.tensor(kind.index).argsort()
    return plan.pull(op.inputs[0], affine.mapped(lambda tensor: tensor.index_select(kind.axis, inverse)), op)


def push_reorder(plan: Plan, op: Op, kind: Reorder, _index: int, affine: Affine) -> None:
    """The same affine, its positions reordered."""
    order = torch.tensor(kind.index)
    varies = affine.varies_along(kind.axis)
    plan.push(op, affine.mapped(lambda tensor: tensor.index_select(kind.axis, order) if varies else tensor))


def _spread(op: Op, kind: PixelShuffle, affine: Affine) -> Affine:
    """From the side with few channels to the one with many: each channel becomes factor squared neighbours."""
    refuse_varying(op, affine, (-2, -1))
    copies = kind.factor**2
    return affine.mapped(lambda t: t.repeat_interleave(copies, -3) if t.shape[-3] > 1 else t)


def _gathered(op: Op, kind: PixelShuffle, affine: Affine) -> Affine:
    """From many channels to few: only where the neighbours that become one channel agree."""
    refuse_varying(op, affine, (-2, -1))
    if not affine.varies_along(affine.rank - 3):
        return affine
    copies = kind.factor**2
    few = affine.mapped(lambda tensor: tensor[..., ::copies, :, :])
    if not torch.equal(_spread(op, kind, few).scale.expand_as(affine.scale), affine.scale) or not torch.equal(
        _spread(op, kind, few).shift.expand_as(affine.shift), affine.shift
    ):
        raise Refused(f"{op.name} turns channels with different scales into positions of one channel")
    return few


def pull_pixels(plan: Plan, op: Op, kind: PixelShuffle, affine: Affine) -> None:
    """PixelShuffle(r) before the affine: each scale belongs to r squared channels (repeat_interleave)."""
    plan.pull(op.inputs[0], (_gathered if kind.inverse else _spread)(op, kind, affine), op)


def push_pixels(plan: Plan, op: Op, kind: PixelShuffle, _index: int, affine: Affine) -> None:
    """PixelShuffle(r) after the affine: the r squared channels of one must agree."""
    plan.push(op, (_spread if kind.inverse else _gathered)(op, kind, affine))


def pull_concat(plan: Plan, op: Op, kind: Concat, affine: Affine) -> None:
    """Each part gets its own run of the affine."""
    start, varies = 0, affine.varies_along(kind.axis)
    for parent in op.inputs:
        size = size_along(parent, kind.axis) if varies else 0
        part = affine.mapped(lambda t, at=start, n=size: t.narrow(kind.axis, at, n)) if varies else affine  # type: ignore[misc]
        plan.pull(parent, part, op)
        start += size


def push_concat(plan: Plan, op: Op, kind: Concat, index: int, affine: Affine) -> None:
    """The affine on its own run of the result, nothing on the others."""
    sizes = [size_along(parent, kind.axis) for parent in op.inputs]
    before, after = sum(sizes[:index]), sum(sizes[index + 1 :])
    plan.push(op, _padded(affine, kind.axis, before, sizes[index], after))


def pull_slice(plan: Plan, op: Op, kind: Slice, affine: Affine) -> None:
    """The affine on the positions that are taken, nothing on the others."""
    size = size_along(op.inputs[0], kind.axis)
    plan.pull(op.inputs[0], _padded(affine, kind.axis, kind.start, kind.stop - kind.start, size - kind.stop), op)


def push_slice(plan: Plan, op: Op, kind: Slice, _index: int, affine: Affine) -> None:
    """The affine of the positions that are taken."""
    if affine.varies_along(kind.axis):
        affine = affine.mapped(lambda tensor: tensor.narrow(kind.axis, kind.start, kind.stop - kind.start))
    plan.push(op, affine)


def _padded(affine: Affine, axis: int, before: int, size: int, after: int) -> Affine:
    """The affine on its run of an axis, and nothing on the positions around it."""

    def pad(tensor: Tensor, value: float) -> Tensor:
        shape = list(tensor.shape)
        shape[axis] = size
        parts = [tensor.new_full([*shape[:axis], n, *shape[axis + 1 :]], value) for n in (before, after)]
        return torch.cat([parts[0], tensor.expand(shape), parts[1]], axis)

    return Affine.of(pad(affine.scale, 1.0), pad(affine.shift, 0.0))


def pull_add(plan: Plan, op: Op, kind: Add, affine: Affine) -> None:
    """``s (a + b) + t = (s a + t) + s b``: the scale into both, the shift once, into whichever takes it."""
    refusals = []
    for taker in (0, 1):

        def both(taker: int = taker) -> None:
            for index, parent in enumerate(op.inputs):
                shift = affine.shift / kind.factors[index] if index == taker else torch.zeros_like(affine.shift)
                plan.pull(parent, _restricted(op, parent, Affine.of(affine.scale, shift)), op)

        if op.inputs[0] is op.inputs[1]:
            raise Refused(f"{op.name} adds a value to itself")
        if (refused := plan.attempt(both)) is None:
            return
        refusals.append(refused)
    raise refusals[0]


def push_add(plan: Plan, op: Op, kind: Add, index: int, affine: Affine) -> None:
    """A shift passes through a sum; a scale would have to be on the other operand too."""
    if affine.has_scale:
        raise Refused(
            f"its scale can't go into {op.name}, whose other operand is not scaled with it",
            "a batch norm after the sum",
        )
    plan.push(op, _widened(op, Affine.of(affine.scale, affine.shift * kind.factors[index])))


def pull_multiply(plan: Plan, op: Op, kind: Multiply, affine: Affine) -> None:
    """``s (a b) = (s a) b``: the scale into whichever factor takes it."""
    if affine.has_shift:
        raise Refused(f"its shift can't cross {op.name}, a product of two values")
    refusals = []
    for parent in op.inputs[:1] if kind.inverse else op.inputs:
        if (refused := plan.attempt(lambda p=parent: plan.pull(p, _restricted(op, p, affine), op))) is None:  # type: ignore[misc]
            return
        refusals.append(refused)
    raise refusals[0]


def push_multiply(plan: Plan, op: Op, kind: Multiply, index: int, affine: Affine) -> None:
    """``(s a) b = s (a b)``: a scale passes through a product."""
    if affine.has_shift:
        raise Refused(f"its shift can't cross {op.name}, a product of two values")
    if kind.inverse and index == 1:
        raise Refused(f"{op.name} divides by it")
    plan.push(op, _widened(op, affine))


def _restricted(op: Op, parent: Op, affine: Affine) -> Affine:
    """The affine on an operand that is broadcast to ``op``'s shape."""
    missing = op.rank - parent.rank
    broadcast = [axis for axis in range(op.rank) if axis < missing or parent.shape[axis - missing] != op.shape[axis]]
    refuse_varying(op, affine, broadcast)
    return affine.mapped(lambda tensor: tensor.reshape(tensor.shape[missing:]))


def _widened(op: Op, affine: Affine) -> Affine:
    missing = op.rank - affine.rank
    return affine.mapped(lambda tensor: tensor.reshape([*[1] * missing, *tensor.shape]))
