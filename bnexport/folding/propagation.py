"""The propagation rules move an affine across each kind of operation, against the data flow (pull) and with it (push).

``PROPAGATION_RULES`` at the end has one row per kind. Each path of rules ends at a linear layer, which absorbs the affine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bnexport.folding import graph as kinds
from bnexport.folding.affine import Affine, ChannelAffine, Dim
from bnexport.folding.graph import Clamp, Identity, Kind, Layer, Op
from bnexport.folding.layers import ABSORBERS, channels_of
from bnexport.folding.plan import FoldPlan, PropagationRules, Refused


def size_along(op: Op, axis: int) -> int:
    """Return the size of a value along an axis; refuse one that varies."""
    size = op.shape[axis]
    if not isinstance(size, int):
        raise Refused(f"the size of {op.name} along axis {axis} varies")
    return size


def refuse_varying(op: Op, affine: Affine, axes: Iterable[int]) -> None:
    """Refuse an affine that differs between positions which an operation mixes."""
    for axis in axes:
        if affine.varies_along(axis % affine.rank):
            raise Refused(f"{op.name} mixes positions of axis {axis % affine.rank}, along which it varies")


def refuse_negative(op: Op, affine: Affine, why: str = "keeps the order of values") -> None:
    """Refuse a negative scale before or after an operation that treats large and small values differently."""
    if negative := int((affine.scale < 0).sum()):
        raise Refused(f"{negative} of its scales are negative, and {op.name} {why}", "gammas that are not negative")


# --- one input, and an affine in another layout on its other side: the table ONE_INPUT ---------------------------------


def _reshaped(op: Op, affine: Affine, start: tuple[Dim, ...], end: tuple[Dim, ...]) -> Affine:
    if (found := affine.reshaped(start, end)) is not None:
        return found
    if start[:1] == end[:1] and all(isinstance(size, int) for size in (*start[1:], *end[1:])):
        raise Refused(f"across {op.name} it would become a map of too many numbers")
    raise Refused(f"{op.name} merges its channels with an axis whose size varies")


def _before_reorder(op: Op, kind: kinds.Reorder, affine: Affine) -> Affine:
    if not affine.varies_along(kind.axis):
        return affine
    if sorted(kind.index) != list(range(size_along(op.inputs[0], kind.axis))):
        raise Refused(f"{op.name} takes some channels more than once or not at all")
    inverse = torch.tensor(kind.index).argsort()
    return affine.mapped(lambda tensor: tensor.index_select(kind.axis, inverse))


def _after_reorder(_op: Op, kind: kinds.Reorder, affine: Affine) -> Affine:
    if not affine.varies_along(kind.axis):
        return affine
    return affine.mapped(lambda tensor: tensor.index_select(kind.axis, torch.tensor(kind.index)))


def _spread(op: Op, kind: kinds.PixelShuffle, affine: Affine) -> Affine:
    """Return the affine of few channels for many: each channel becomes factor squared neighbours."""
    refuse_varying(op, affine, (-2, -1))
    copies = kind.factor**2
    return affine.mapped(lambda t: t.repeat_interleave(copies, -3) if t.shape[-3] > 1 else t)


def _gathered(op: Op, kind: kinds.PixelShuffle, affine: Affine) -> Affine:
    """Return the affine of many channels for few; refuse it where neighbours that become one channel differ."""
    refuse_varying(op, affine, (-2, -1))
    if not affine.varies_along(affine.rank - 3):
        return affine
    few = affine.mapped(lambda tensor: tensor[..., :: kind.factor**2, :, :])
    again = _spread(op, kind, few)
    if not Affine(again.scale.expand_as(affine.scale), again.shift.expand_as(affine.shift)).equals(affine):
        raise Refused(f"{op.name} turns channels with different scales or shifts into positions of one channel")
    return few


def _before_slice(op: Op, kind: kinds.Slice, affine: Affine) -> Affine:
    size = size_along(op.inputs[0], kind.axis)
    return _padded(affine, kind.axis, kind.start, kind.stop - kind.start, size - kind.stop)


def _after_slice(_op: Op, kind: kinds.Slice, affine: Affine) -> Affine:
    if not affine.varies_along(kind.axis):
        return affine
    return affine.mapped(lambda tensor: tensor.narrow(kind.axis, kind.start, kind.stop - kind.start))


def _padded(affine: Affine, axis: int, before: int, size: int, after: int) -> Affine:
    """Return the affine on its run of an axis, and the identity on the positions around it."""

    def pad(tensor: Tensor, value: float) -> Tensor:
        shape = list(tensor.shape)
        shape[axis] = size
        parts = [tensor.new_full([*shape[:axis], n, *shape[axis + 1 :]], value) for n in (before, after)]
        return torch.cat([parts[0], tensor.expand(shape), parts[1]], axis)

    return Affine.of(pad(affine.scale, 1.0), pad(affine.shift, 0.0))


def _across_average(op: Op, kind: kinds.Average, affine: Affine) -> Affine:
    """A mean with weights that add up to one commutes with an affine per channel."""
    refuse_varying(op, affine, kind.axes)
    if not kind.exact and affine.has_shift:
        hint = "count_include_pad=False, no divisor_override, or another padding than zeros"
        raise Refused(f"its shift can't cross {op.name}, which averages or pads with zeros", hint)
    return affine


def _before_mean(op: Op, kind: kinds.Mean, affine: Affine) -> Affine:
    """The mean over whole axes commutes with an affine that is the same along them."""
    if not kind.keepdim:
        for axis in sorted(kind.axes):
            affine = affine.mapped(lambda tensor, at=axis: tensor.unsqueeze(at))  # type: ignore[misc]
    refuse_varying(op, affine, kind.axes)
    return affine


def _after_mean(op: Op, kind: kinds.Mean, affine: Affine) -> Affine:
    refuse_varying(op, affine, kind.axes)
    if kind.keepdim:
        return affine
    kept = [axis for axis in range(affine.rank) if axis not in kind.axes]
    return affine.mapped(lambda tensor: tensor.reshape([tensor.shape[axis] for axis in kept]))


def _across_maximum(op: Op, kind: kinds.WindowMaximum, affine: Affine) -> Affine:
    """``max(s x + t) = s max(x) + t`` for s >= 0."""
    refuse_varying(op, affine, kind.axes)
    refuse_negative(op, affine)
    return affine


def _across_homogeneous(op: Op, _kind: kinds.Homogeneous, affine: Affine) -> Affine:
    """``s f(x) = f(s x)`` for s >= 0."""
    if affine.has_shift:
        raise Refused(f"its shift can't cross {op.name}")
    refuse_negative(op, affine, "has another slope for negative values")
    return affine


#: Kind with one input -> two functions ``(op, kind, affine) -> affine``: the affine on the input that equals the given affine
#: on the output, and the affine on the output that equals the given affine on the input. Each may raise Refused.
ONE_INPUT: dict[type[Kind], tuple[Callable[[Op, Any, Affine], Affine], Callable[[Op, Any, Affine], Affine]]] = {
    kinds.Reshape: (
        lambda op, _kind, affine: _reshaped(op, affine, op.shape, op.inputs[0].shape),
        lambda op, _kind, affine: _reshaped(op, affine, op.inputs[0].shape, op.shape),
    ),
    kinds.Permute: (
        lambda _op, kind, affine: affine.mapped(lambda t: t.permute([kind.axes.index(axis) for axis in range(t.ndim)])),
        lambda _op, kind, affine: affine.mapped(lambda t: t.permute(kind.axes)),
    ),
    kinds.Reorder: (_before_reorder, _after_reorder),
    kinds.PixelShuffle: (
        lambda op, kind, affine: (_gathered if kind.inverse else _spread)(op, kind, affine),
        lambda op, kind, affine: (_spread if kind.inverse else _gathered)(op, kind, affine),
    ),
    kinds.Slice: (_before_slice, _after_slice),
    kinds.Average: (_across_average, _across_average),
    kinds.Mean: (_before_mean, _after_mean),
    kinds.WindowMaximum: (_across_maximum, _across_maximum),
    kinds.Homogeneous: (_across_homogeneous, _across_homogeneous),
}


def _pull_across(plan: FoldPlan, op: Op, kind: Kind, affine: Affine) -> None:
    plan.pull(op.inputs[0], ONE_INPUT[type(kind)][0](op, kind, affine), op)


def _push_across(plan: FoldPlan, op: Op, kind: Kind, _index: int, affine: Affine) -> None:
    plan.push(op, ONE_INPUT[type(kind)][1](op, kind, affine))


# --- several inputs ----------------------------------------------------------------------------------------------------


def _pull_identity(plan: FoldPlan, op: Op, kind: Identity, affine: Affine) -> None:
    plan.pull(op.inputs[kind.index], affine, op)


def _push_identity(plan: FoldPlan, op: Op, kind: Identity, index: int, affine: Affine) -> None:
    if index == kind.index:
        plan.push(op, affine)


def _pull_concat(plan: FoldPlan, op: Op, kind: kinds.Concat, affine: Affine) -> None:
    start, varies = 0, affine.varies_along(kind.axis)
    for parent in op.inputs:
        size = size_along(parent, kind.axis) if varies else 0
        part = affine.mapped(lambda t, at=start, n=size: t.narrow(kind.axis, at, n)) if varies else affine  # type: ignore[misc]
        plan.pull(parent, part, op)
        start += size


def _push_concat(plan: FoldPlan, op: Op, kind: kinds.Concat, index: int, affine: Affine) -> None:
    """Push the affine on its own run of the result, and the identity on the others."""
    sizes = [size_along(parent, kind.axis) for parent in op.inputs]
    before, after = sum(sizes[:index]), sum(sizes[index + 1 :])
    plan.push(op, _padded(affine, kind.axis, before, sizes[index], after))


def _pull_add(plan: FoldPlan, op: Op, kind: kinds.WeightedSum, affine: Affine) -> None:
    """``s (a + b) + t = (s a + t) + s b``: the scale into both operands, the shift into the first that takes it."""
    if op.inputs[0] is op.inputs[1]:
        raise Refused(f"{op.name} adds a value to itself")
    refusals = []
    for taker in (0, 1):

        def both(taker: int = taker) -> None:
            for index, parent in enumerate(op.inputs):
                shift = affine.shift / kind.factors[index] if index == taker else torch.zeros_like(affine.shift)
                plan.pull(parent, _restricted(op, parent, Affine.of(affine.scale, shift)), op)

        if (refused := plan.attempt(both)) is None:
            return
        refusals.append(refused)
    raise refusals[0]


def _push_add(plan: FoldPlan, op: Op, kind: kinds.WeightedSum, index: int, affine: Affine) -> None:
    """A shift passes through a sum; a scale would have to be on the other operand too."""
    if affine.has_scale:
        why = f"its scale can't go into {op.name}, whose other operand is not scaled with it"
        raise Refused(why, "a batch norm after the sum")
    plan.push(op, _widened(op, Affine.of(affine.scale, affine.shift * kind.factors[index])))


def _pull_multiply(plan: FoldPlan, op: Op, kind: kinds.Multiply, affine: Affine) -> None:
    """``s (a b) = (s a) b``: the scale into the first factor that takes it."""
    if affine.has_shift:
        raise Refused(f"its shift can't cross {op.name}, a {'quotient' if kind.inverse else 'product'} of two values")
    refusals = []
    for parent in op.inputs[:1] if kind.inverse else op.inputs:
        if (refused := plan.attempt(lambda p=parent: plan.pull(p, _restricted(op, p, affine), op))) is None:  # type: ignore[misc]
            return
        refusals.append(refused)
    raise refusals[0]


def _push_multiply(plan: FoldPlan, op: Op, kind: kinds.Multiply, index: int, affine: Affine) -> None:
    """``(s a) b = s (a b)``: a scale passes through a product."""
    if affine.has_shift:
        raise Refused(f"its shift can't cross {op.name}, a {'quotient' if kind.inverse else 'product'} of two values")
    if kind.inverse and index == 1:
        raise Refused(f"{op.name} divides by it")
    plan.push(op, _widened(op, affine))


def _restricted(op: Op, parent: Op, affine: Affine) -> Affine:
    """Return the affine on an operand that is broadcast to ``op``'s shape."""
    missing = op.rank - parent.rank
    broadcast = [axis for axis in range(op.rank) if axis < missing or parent.shape[axis - missing] != op.shape[axis]]
    for axis in broadcast:
        if affine.varies_along(axis):
            raise Refused(f"{op.name} repeats {parent.name} along axis {axis}, along which it varies")
    return affine.mapped(lambda tensor: tensor.reshape(tensor.shape[missing:]))


def _widened(op: Op, affine: Affine) -> Affine:
    missing = op.rank - affine.rank
    return affine.mapped(lambda tensor: tensor.reshape([*[1] * missing, *tensor.shape]))


def _pull_clamp(plan: FoldPlan, op: Op, kind: Clamp, affine: Affine) -> None:
    """``s clamp(x, a, b) + t = clamp(s x + t, s a + t, s b + t)``, the bounds exchanged where s < 0."""
    scale, shift = affine.scale, affine.shift
    ends = [torch.where(scale == 0, shift, scale * bound + shift) for bound in (kind.low, kind.high)]
    swap = scale < 0
    bounds = _bounds(plan, op, torch.where(swap, ends[1], ends[0]), torch.where(swap, ends[0], ends[1]))
    if _passes(bounds) > _passes(kind):
        signs = "some of its scales are negative" if bool(swap.any()) else "some of its scales are 0"
        raise Refused(
            f"{signs}, so {op.name} would become two clamps, which cost more than the batch norm itself",
            "gammas of one sign, none of them 0",
        )
    plan.edit(op, bounds)
    plan.pull(op.inputs[0], affine, op)


def _push_clamp(plan: FoldPlan, op: Op, kind: Clamp, _index: int, affine: Affine) -> None:
    """``clamp(s x + t, a, b) = s clamp(x, (a - t) / s, (b - t) / s) + t``, the bounds exchanged where s < 0.

    So a ReLU that follows a BatchNorm becomes one maximum with a constant per channel. Where s = 0 the value is a constant.
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


def _bounds(plan: FoldPlan, op: Op, low: Tensor, high: Tensor) -> Clamp:
    for bound in (low, high):
        if op.dtype is not None:
            plan.storable(torch.where(torch.isinf(bound), 0.0, bound), op.dtype, "bound of the activation")
    found = Affine.of(low, high)
    clamp = Clamp(found.scale, found.shift)
    if clamp.low.numel() == 1:  # the same bounds everywhere: a ReLU or a Clip
        return clamp
    why = f"across {op.name} it would become a bound per channel, which"
    if plan.in_place:
        raise Refused(f"{why} the module does not have")
    if not plan.clamps:
        slow = "ONNX Runtime computes no faster on a CPU than the batch norm (docs/results/affine_form.md)"
        raise Refused(f"{why} {slow}", "--clamps")
    return clamp


def _passes(clamp: Clamp) -> int:
    """Return the number of elementwise operations of a clamp: a maximum, a minimum, or both."""
    return int(bool((clamp.low > -torch.inf).any())) + int(bool((clamp.high < torch.inf).any()))


def _pull_norm(plan: FoldPlan, op: Op, kind: kinds.ConstantAffine, affine: Affine) -> None:
    """Two affines in a row are one affine. Pull it further if possible, else merge it into another BatchNorm's affine.

    Nothing is merged into plain arithmetic: a BatchNorm that ended there would be gone from the report but not from the graph.
    """
    both = affine.after(kind.affine)

    def onwards() -> None:
        plan.edit(op, Identity())
        plan.pull(op.inputs[0], both, op)

    _onwards_or_here(plan, op, onwards, both, affine)


def _push_norm(plan: FoldPlan, op: Op, kind: kinds.ConstantAffine, _index: int, affine: Affine) -> None:
    """Merge the earlier of two affines into the later, which is folded in its turn; plain arithmetic is crossed."""
    both = kind.affine.after(affine)

    def onwards() -> None:
        plan.edit(op, Identity())
        plan.push(op, both)

    if op.norm is not None:
        plan.norm(op, both, held=affine.scale.numel())
        plan.into[op] = None
    else:
        _onwards_or_here(plan, op, onwards, both, affine)


def _onwards_or_here(plan: FoldPlan, op: Op, onwards: Callable[[], None], both: Affine, moved: Affine) -> None:
    if (refused := plan.attempt(onwards)) is None:
        return
    if op.norm is None:
        raise refused
    plan.norm(op, both, held=moved.scale.numel())
    plan.into[op] = None


_NO_RULE = ", which no rule moves a scale and shift across"


def _pull_opaque(_plan: FoldPlan, op: Op, kind: kinds.Opaque, _affine: Affine) -> None:
    raise Refused(f"it follows {op.name}" + (f": {kind.reason}" if kind.reason else _NO_RULE))


def _push_opaque(_plan: FoldPlan, op: Op, kind: kinds.Opaque, _index: int, _affine: Affine) -> None:
    if kind.is_output:
        raise Refused("it is an output of the model")
    raise Refused(f"it feeds {op.name}" + (f": {kind.reason}" if kind.reason else _NO_RULE))


def _pull_layer(plan: FoldPlan, op: Op, layer: Layer, affine: Affine) -> None:
    """``s (W x + b) + t = (s W) x + (s b + t)``: exact for every stride, dilation, padding and group count."""
    vector = _channels(op, layer, affine, output=True)
    absorber = ABSORBERS[layer.layout]
    weight = absorber.scale_outputs(layer.weight.load(), vector.scale, layer.groups) if affine.has_scale else None
    bias = None if layer.bias is None else layer.bias.load()
    after = None if layer.after is None else layer.after * affine.scale
    if layer.takes_bias:
        bias = vector.shift.clone() if bias is None else bias * vector.scale + vector.shift
        if layer.bias is None and not affine.has_shift:
            bias = None
    elif affine.has_shift:
        after = affine.shift if after is None else after + affine.shift
    plan.layer(op, layer, weight=weight, bias=bias, after=after)


def _push_layer(plan: FoldPlan, op: Op, layer: Layer, _index: int, affine: Affine) -> None:
    """``W (s x + t) + b = (W s) x + (W t + b)``: exact for every scale, and for a shift without zero padding."""
    vector = _channels(op, layer, affine, output=False)
    absorber, stored = ABSORBERS[layer.layout], layer.weight.load()
    weight = absorber.scale_inputs(stored, vector.scale, layer.groups) if affine.has_scale else None
    bias, after = None, None
    if affine.has_shift:
        if layer.zero_padded or absorber.push_shift is None:
            after = _bias_map(plan, op, layer, affine)
        else:
            gained = absorber.push_shift(stored, vector.shift, layer.groups)
            if layer.takes_bias and gained.ndim == 1:
                bias = gained if layer.bias is None else layer.bias.load() + gained
            else:
                after = _on_output(op, layer, gained)
        if after is not None and layer.after is not None:
            after = after + layer.after
    plan.layer(op, layer, weight=weight, bias=bias, after=after)


def _channels(op: Op, layer: Layer, affine: Affine, *, output: bool) -> ChannelAffine:
    axis = layer.out_axis if output else layer.in_axis
    if isinstance(axis, str):
        raise Refused(axis)
    size = channels_of(layer.layout, layer.weight.shape, layer.groups)[1 if output else 0]
    found = affine.channels(axis, size)
    if found is None:
        varying = [other for other in affine.varying if other != axis]
        side = "output" if output else "input"
        raise Refused(
            f"it normalises axis {', '.join(map(str, varying))}, the {side} channels of {op.name} are on axis {axis}"
            " (equal sizes would not make it right)"
            if varying
            else f"it has another number of channels than {op.name}",
            "channels on the axis that the layer computes",
        )
    return found


def _on_output(op: Op, layer: Layer, gained: Tensor) -> Tensor:
    """Return (out,) or (..., out) as a shift on the output's axes."""
    if gained.ndim == 1:
        shape = [1] * op.rank
        shape[int(layer.out_axis)] = -1
        return gained.reshape(shape)
    return gained.unsqueeze(-2 if int(layer.out_axis) == op.rank - 1 else -1)


def _bias_map(plan: FoldPlan, op: Op, layer: Layer, affine: Affine) -> Tensor:
    """Return the result of a constant input, one value per position: outputs near a border use fewer kernel taps."""
    refused = f"its shift can't be folded into {op.name}"
    if not plan.maps and layer.layout == "transposed":
        raise Refused(f"{refused}, whose output positions use different kernel taps")
    if not plan.maps:
        hint = "padding 0 or padding_mode 'reflect', 'replicate' or 'circular' there"
        raise Refused(f"{refused}, which pads its input with zeros", hint)
    parent = op.inputs[0]
    if not all(isinstance(size, int) for size in (*parent.shape[1:], *op.shape[1:])):
        raise Refused(f"{refused} as a map of constants: height or width varies", "fixed sizes")
    constant = affine.shift.expand(1, *(int(size) for size in parent.shape[1:]))
    found = plan.graph.evaluate(op, replace(layer, bias=None, after=None), [constant.contiguous()])
    moved = f"its shift as a map of constants after {op.name}"
    if found.numel() >= constant.numel():
        raise Refused(f"{moved} would cost as much as the one addition that it saves")
    plan.spend(found.numel(), moved)
    return found


#: One row per kind.
PROPAGATION_RULES: PropagationRules = {
    **dict.fromkeys(ONE_INPUT, (_pull_across, _push_across)),
    Layer: (_pull_layer, _push_layer),
    kinds.ConstantAffine: (_pull_norm, _push_norm),
    Identity: (_pull_identity, _push_identity),
    Clamp: (_pull_clamp, _push_clamp),
    kinds.Concat: (_pull_concat, _push_concat),
    kinds.WeightedSum: (_pull_add, _push_add),
    kinds.Multiply: (_pull_multiply, _push_multiply),
    kinds.Opaque: (_pull_opaque, _push_opaque),
}
