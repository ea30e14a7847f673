"""How an affine crosses what mixes positions (pooling, interpolation, means), activations, and other affines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bnexport.folding.affine import Affine
from bnexport.folding.graph import Average, Clamp, Homogeneous, Identity, MaxPool, Mean, Norm, Op, Opaque
from bnexport.folding.moves_common import refuse_negative, refuse_varying
from bnexport.folding.plan import Plan, Refused


def pull_average(plan: Plan, op: Op, kind: Average, affine: Affine) -> None:
    """A mean with weights that add up to one commutes with an affine per channel."""
    _check_average(op, kind, affine)
    plan.pull(op.inputs[0], affine, op)


def push_average(plan: Plan, op: Op, kind: Average, _index: int, affine: Affine) -> None:
    """As ``pull_average``."""
    _check_average(op, kind, affine)
    plan.push(op, affine)


def _check_average(op: Op, kind: Average, affine: Affine) -> None:
    refuse_varying(op, affine, kind.axes)
    if not kind.exact and affine.has_shift:
        raise Refused(
            f"its shift can't cross {op.name}, which averages or pads with zeros",
            "count_include_pad=False, no divisor_override, or another padding than zeros",
        )


def pull_mean(plan: Plan, op: Op, kind: Mean, affine: Affine) -> None:
    """The mean over whole axes commutes with an affine that is the same along them."""
    if not kind.keepdim:
        affine = affine.mapped(lambda tensor: _with_axes(tensor, kind.axes))
    refuse_varying(op, affine, kind.axes)
    plan.pull(op.inputs[0], affine, op)


def _with_axes(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    for axis in sorted(axes):
        tensor = tensor.unsqueeze(axis)
    return tensor


def push_mean(plan: Plan, op: Op, kind: Mean, _index: int, affine: Affine) -> None:
    """As ``pull_mean``."""
    refuse_varying(op, affine, kind.axes)
    if not kind.keepdim:
        kept = [axis for axis in range(affine.rank) if axis not in kind.axes]
        affine = affine.mapped(lambda tensor: tensor.reshape([tensor.shape[axis] for axis in kept]))
    plan.push(op, affine)


def pull_max_pool(plan: Plan, op: Op, kind: MaxPool, affine: Affine) -> None:
    """``max(s x + t) = s max(x) + t`` for s >= 0."""
    refuse_varying(op, affine, kind.axes)
    refuse_negative(op, affine)
    plan.pull(op.inputs[0], affine, op)


def push_max_pool(plan: Plan, op: Op, kind: MaxPool, _index: int, affine: Affine) -> None:
    """As ``pull_max_pool``."""
    refuse_varying(op, affine, kind.axes)
    refuse_negative(op, affine)
    plan.push(op, affine)


def pull_clamp(plan: Plan, op: Op, kind: Clamp, affine: Affine) -> None:
    """``s clamp(x, a, b) + t = clamp(s x + t, s a + t, s b + t)``, the bounds exchanged where s < 0."""
    scale, shift = affine.scale, affine.shift
    ends = [torch.where(scale == 0, shift, scale * bound + shift) for bound in (kind.low, kind.high)]
    swap = scale < 0
    bounds = _bounds(plan, op, torch.where(swap, ends[1], ends[0]), torch.where(swap, ends[0], ends[1]))
    if passes(bounds) > passes(kind):
        raise Refused(
            f"its scale has both signs, so {op.name} would become two clamps, which cost more than the batch norm itself",
            "gammas of one sign",
        )
    plan.edit(op, bounds)
    plan.pull(op.inputs[0], affine, op)


def push_clamp(plan: Plan, op: Op, kind: Clamp, _index: int, affine: Affine) -> None:
    """``clamp(s x + t, a, b) = s clamp(x, (a - t) / s, (b - t) / s) + t``, the bounds exchanged where s < 0.

    So a ReLU behind a BatchNorm becomes one maximum with a constant per channel. Where s = 0 the value is a constant.
    """
    scale, shift = affine.scale, affine.shift
    dead, infinity = scale == 0, torch.full_like(scale, torch.inf)
    divisor = torch.where(dead, torch.ones_like(scale), scale)
    ends = [(bound - shift) / divisor for bound in (kind.low, kind.high)]
    low = torch.where(scale < 0, ends[1], ends[0])
    high = torch.where(scale < 0, ends[0], ends[1])
    bounds = _bounds(plan, op, torch.where(dead, -infinity, low), torch.where(dead, infinity, high))
    plan.edit(op, bounds)
    constant = torch.minimum(torch.maximum(shift, kind.low), kind.high)
    plan.push(op, Affine.of(scale, torch.where(dead, constant, shift)))


def _bounds(plan: Plan, op: Op, low: Tensor, high: Tensor) -> Clamp:
    for bound in (low, high):
        if op.dtype is not None:
            plan.storable(torch.where(torch.isinf(bound), 0.0, bound), op.dtype, "bound of the activation")
    found = Affine.of(low, high)
    clamp = Clamp(found.scale, found.shift)
    if not plan.clamps and not is_plain(clamp):
        raise Refused(
            f"across {op.name} it would become a bound per channel, which ONNX Runtime computes no faster on a CPU than the"
            " batch norm (docs/affine_form.md)",
            "--clamps",
        )
    return clamp


def is_plain(clamp: Clamp) -> bool:
    """Whether a clamp has the same bounds everywhere, so that it is a ReLU or a Clip."""
    return clamp.low.numel() == 1


def passes(clamp: Clamp) -> int:
    """How many elementwise operations a clamp is: a maximum, a minimum, or both."""
    return int(bool((clamp.low > -torch.inf).any())) + int(bool((clamp.high < torch.inf).any()))


def pull_homogeneous(plan: Plan, op: Op, _kind: Homogeneous, affine: Affine) -> None:
    """``s f(x) = f(s x)`` for s >= 0."""
    _check_homogeneous(op, affine)
    plan.pull(op.inputs[0], affine, op)


def push_homogeneous(plan: Plan, op: Op, _kind: Homogeneous, _index: int, affine: Affine) -> None:
    """As ``pull_homogeneous``."""
    _check_homogeneous(op, affine)
    plan.push(op, affine)


def _check_homogeneous(op: Op, affine: Affine) -> None:
    if affine.has_shift:
        raise Refused(f"its shift can't cross {op.name}")
    refuse_negative(op, affine)


def pull_norm(plan: Plan, op: Op, kind: Norm, affine: Affine) -> None:
    """Two affines in a row are one; it goes on upwards if it can, else another BatchNorm's affine takes it in.

    Plain arithmetic takes nothing in: a BatchNorm that ended there would be gone from the account and not from the graph.
    """
    both = affine.after(kind.affine)

    def onwards() -> None:
        plan.edit(op, Identity())
        plan.pull(op.inputs[0], both, op)

    _onwards_or_here(plan, op, onwards, both, affine)


def push_norm(plan: Plan, op: Op, kind: Norm, _index: int, affine: Affine) -> None:
    """The later of two affines takes in the earlier one, and has its own turn; plain arithmetic is crossed."""
    both = kind.affine.after(affine)

    def onwards() -> None:
        plan.edit(op, Identity())
        plan.push(op, both)

    if op.norm is not None:
        plan.norm(op, both, held=affine.scale.numel())
        plan.into[op] = None
    else:
        _onwards_or_here(plan, op, onwards, both, affine)


def _onwards_or_here(plan: Plan, op: Op, onwards: Callable[[], None], both: Affine, moved: Affine) -> None:
    refused = plan.attempt(onwards)
    if refused is None:
        return
    if op.norm is None:
        raise refused
    plan.norm(op, both, held=moved.scale.numel())
    plan.into[op] = None


def pull_opaque(_plan: Plan, op: Op, kind: Opaque, _affine: Affine) -> None:
    """Nothing is known to cross it."""
    raise Refused(
        f"it follows {op.name}" + (f": {kind.reason}" if kind.reason else ", which no scale and shift can cross")
    )


def push_opaque(_plan: Plan, op: Op, kind: Opaque, _index: int, _affine: Affine) -> None:
    """As ``pull_opaque``."""
    if kind.is_output:
        raise Refused("it is an output of the model")
    raise Refused(
        f"it feeds {op.name}" + (f": {kind.reason}" if kind.reason else ", which no scale and shift can cross")
    )
