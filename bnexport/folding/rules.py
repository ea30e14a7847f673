"""The table of rules: the ways to remove one affine, cheapest first.

Each rule fills a plan or refuses with a sentence. The sentences of all refusals are the reason in the fold report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bnexport.folding.affine import Affine
from bnexport.folding.fold_report import FoldOutcome
from bnexport.folding.graph import Clamp, ConstantAffine, Identity, Layer, Op
from bnexport.folding.plan import FoldPlan, Refused


@dataclass(frozen=True)
class Rule:
    """One way to remove an affine, or to make it cheaper."""

    name: str  # Name in the fold report
    equation: str  # The computation; W, b are the layer's weight and bias, s, t the affine's scale and shift
    plan: Callable[[FoldPlan, Op, Affine], None]  # Fills the plan for a site, or raises Refused
    outcome: FoldOutcome | None = None  # Outcome of a site with this rule; None if it depends on the path of the affine
    maps: bool = False  # Allow maps of constants after zero padding


def _backward(plan: FoldPlan, site: Op, affine: Affine) -> None:
    plan.edit(site, Identity())
    plan.pull(site.inputs[0], affine, site)


#: Element type -> largest |mean| / deviation with which a shift may move behind the sum that a layer computes. Above it, the
#: mean that was subtracted exactly before the layer would have to cancel within the layer's rounding.
_LARGEST_OFFSET = {torch.float16: 2.0**4, torch.bfloat16: 2.0**2, torch.float32: 2.0**10}


def _refuse_cancellation(site: Op) -> None:
    offset = site.norm.offset if site.norm is not None else 0.0
    if site.dtype is not None and offset > _LARGEST_OFFSET.get(site.dtype, float("inf")):
        raise Refused(
            f"its mean is up to {offset:.3g} times its deviation: subtracted after the layer, it would cancel in {site.dtype}",
            "inputs nearer to a mean of 0",
        )


def _forward(plan: FoldPlan, site: Op, affine: Affine) -> None:
    _refuse_cancellation(site)
    plan.edit(site, Identity())
    plan.push(site, affine)


def _both(plan: FoldPlan, site: Op, affine: Affine) -> None:
    if not affine.has_scale or not affine.has_shift:
        raise Refused("it has only a scale or only a shift")
    _refuse_cancellation(site)
    plan.edit(site, Identity())
    plan.pull(site.inputs[0], affine.scale_alone(), site)
    plan.push(site, affine.shift_alone())


#: Smallest |scale| to divide by: the product of a smaller one and a weight may be subnormal in float32, which is stored as 0.
_SMALLEST_DIVISOR = 1e-25


def _scale_forward(plan: FoldPlan, site: Op, affine: Affine) -> None:
    """``W (s x + t) = (W s) (x + t / s)``: one addition stays before the layer.

    For s > 0 the scale also crosses ReLU, LeakyReLU and PReLU: ``f(s x + t) = s f(x + t / s)``. With a negative scale in some
    channel, a multiplication by the sign would have to stay next to the addition, which saves nothing.
    """
    if not affine.has_scale:
        raise Refused("it has no scale to move")
    if bool((affine.scale == 0).any()):
        raise Refused(f"{int((affine.scale == 0).sum())} of its scales are 0, and the shift can't be divided by them")
    if bool((affine.scale.abs() < _SMALLEST_DIVISOR).any()):
        raise Refused("some of its scales are so small that a weight would vanish when multiplied by them")
    plan.norm(site, Affine.of(torch.ones_like(affine.scale), affine.shift / affine.scale))
    plan.push(site, affine.scale_alone())
    if any(isinstance(plan.edits[op], ConstantAffine) for op in plan.into):
        raise Refused("another affine would absorb its scale, and both would stay")


#: Every rule, in the order in which they are tried.
RULES: tuple[Rule, ...] = (
    Rule("into what comes before", "W' = s W, b' = s b + t", _backward),
    Rule("into what comes after", "W' = W s, b' = b + W t", _forward),
    Rule("scale before, shift after", "W1' = s W1, b1' = s b1; b2' = b2 + W2 t", _both),
    Rule("map of constants behind zero padding", "W' = W s, y = W' x + b + W t", _forward, maps=True),
    Rule("scale after, one addition stays", "W' = W s, x' = x + t / s", _scale_forward, "affine"),
)


def outcome_of(rule: Rule, plan: FoldPlan, site: Op) -> FoldOutcome:
    """Return the outcome: into the next layer, across other operations, or into another affine."""
    if rule.outcome is not None:
        return rule.outcome
    if any(isinstance(plan.edits.get(op), ConstantAffine) for op in plan.into):
        return "merged"
    passive = [op for op in plan.path if op is not site and not isinstance(op.kind, (Layer, Identity))]
    if passive or rule.plan is _both:
        return "through"
    return "backward" if rule.plan is _backward else "forward"


def equation_of(rule: Rule, plan: FoldPlan) -> str:
    """Return the rule's equation, with its effect on activations."""
    clamps = [op for op, kind in plan.edits.items() if isinstance(kind, Clamp) and not kind.same_bounds(op.kind)]
    merged = [kind for kind in plan.edits.values() if isinstance(kind, ConstantAffine)]
    if merged and rule.outcome is None:
        return "s' = s2 s, t' = s2 t + t2"
    if clamps:
        return f"{rule.equation}; clamp(s x + t, a, b) = s clamp(x, (a - t) / s, (b - t) / s) + t"
    return rule.equation
