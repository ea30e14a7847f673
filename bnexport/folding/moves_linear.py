"""How linear layers take in an affine: where every move ends."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bnexport.folding.affine import Affine, ChannelAffine
from bnexport.folding.graph import Layer, Op
from bnexport.folding.layers import ABSORBERS, channels_of
from bnexport.folding.plan import Plan, Refused


def pull_layer(plan: Plan, op: Op, layer: Layer, affine: Affine) -> None:
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


def push_layer(plan: Plan, op: Op, layer: Layer, _index: int, affine: Affine) -> None:
    """``W (s x + t) + b = (W s) x + (W t + b)``: the scale always; the shift where no zeros are put beside it."""
    vector = _channels(op, layer, affine, output=False)
    absorber, stored = ABSORBERS[layer.layout], layer.weight.load()
    weight = absorber.scale_inputs(stored, vector.scale, layer.groups) if affine.has_scale else None
    bias, after = None, None
    if affine.has_shift:
        edge = layer.zero_padded or layer.layout == "transposed"
        if edge and not plan.maps:
            where = "which puts zeros around its input" if layer.zero_padded else "whose edges see fewer taps"
            raise Refused(
                f"its shift can't go into {op.name}, {where}",
                "padding 0 or padding_mode 'reflect', 'replicate' or 'circular' there",
            )
        if edge:
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
        varying = [other for other in range(affine.rank) if affine.varies_along(other) and other != axis]
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
    """(out,) or (..., out) as a shift on the output's axes."""
    if gained.ndim == 1:
        shape = [1] * op.rank
        shape[int(layer.out_axis)] = -1
        return gained.reshape(shape)
    return gained.unsqueeze(-2 if int(layer.out_axis) == op.rank - 1 else -1)


def _bias_map(plan: Plan, op: Op, layer: Layer, affine: Affine) -> Tensor:
    """What a constant input gives behind zero padding: another value near each edge, so one per output position."""
    parent = op.inputs[0]
    sizes = [*parent.shape[1:], *op.shape[1:]]
    if not all(isinstance(size, int) for size in sizes):
        raise Refused(f"its shift can't go into {op.name} as a map of constants: height or width varies", "fixed sizes")
    constant = affine.shift.expand(1, *(int(size) for size in parent.shape[1:]))
    found = plan.graph.evaluate(op, replace(layer, bias=None, after=None), [constant.contiguous()])
    if not plan.budget.allows(plan.grown + found.numel()):
        raise Refused(
            f"its shift as a map of constants behind {op.name} would exceed the size budget of {plan.budget.max_growth:g}",
            "--max-growth 1.5, or padding 0 there",
        )
    if found.numel() >= torch.Size(constant.shape).numel():
        raise Refused(
            f"its shift as a map of constants behind {op.name} would cost as much as the one addition that it saves"
        )
    plan.grown += found.numel()
    return found
