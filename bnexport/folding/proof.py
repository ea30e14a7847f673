"""Proofs in float64: of one plan on its own part of the graph, and of a whole folded network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnexport.folding.graph import ConstantAffine, Graph, Layer, Op, Reshape, Slice
from bnexport.folding.plan import FoldPlan
from bnexport.optional import one_line

#: Rounding of float64 in a handful of operations; the smallest real fault (a dropped eps) is far above.
MAX_SITE_ERROR = 1e-12
#: Positions of a spatial axis in a probe, the fewest first: a few where padding lets the kernels fit, then as traced.
_LARGEST: tuple[int | None, ...] = (4, 12, None)


#: What operators raise over sizes that do not fit.
_PROBLEMS = (RuntimeError, TypeError, ValueError, IndexError)


class _PlannedFailsError(Exception):
    """An operation runs untouched, but not as planned."""


class NotComparedError(Exception):
    """Nothing of a plan could be compared; the reason is a sentence without its full stop."""


def plan_error(graph: Graph, plan: FoldPlan, *, seed: int = 0) -> float:
    """Return the largest difference that a plan makes anywhere outside its own operations, in float64.

    Every value that leaves the plan's part of the graph is compared, also values that the plan assumes to be unread: an
    overlooked reader would show. The untouched part runs the backend's operators on seeded noise, separate for each channel;
    images are cut to a few pixels where nothing depends on their size.

    Returns:
        max |planned - untouched| / max |untouched|, worst value; infinity when only the planned part can't be run.

    Raises:
        NotComparedError: The part can't be run at any size, or gives no number to compare.
    """
    reason, fails = "it gives no number to compare", False
    region = sorted(plan.path, key=lambda op: op.index)
    sizes: tuple[int | None, ...] = (None,) if _needs_full_size(region, plan) else _LARGEST
    for largest in sizes:
        try:
            error = _region_error(graph, plan, region, largest, seed)
        except _PlannedFailsError:
            fails = True
            continue
        except _PROBLEMS as problem:
            reason = one_line(problem, 160)
            continue
        if error is not None:
            return error
    if fails:
        return float("inf")
    raise NotComparedError(reason)


def _needs_full_size(region: Sequence[Op], plan: FoldPlan) -> bool:
    for op in region:
        kind = plan.edits.get(op, op.kind)
        if isinstance(kind, Reshape) or (isinstance(kind, Slice) and kind.axis >= 2):
            return True
        if isinstance(kind, Layer) and kind.after is not None and kind.after.numel() > max(kind.after.shape):
            return True
        if isinstance(kind, ConstantAffine) and kind.affine.scale.numel() > max(kind.affine.scale.shape, default=1):
            return True
    return False


def _region_error(graph: Graph, plan: FoldPlan, region: Sequence[Op], largest: int | None, seed: int) -> float | None:
    """Return the largest difference; None where values leave the region and none of them has an element."""
    generator = torch.Generator().manual_seed(seed)
    inside = set(region)
    old: dict[Op, Tensor] = {}
    for op in region:
        for parent in op.inputs:
            if parent not in inside and parent not in old:
                old[parent] = graph.probe(parent, generator, largest=largest)
    new = dict(old)
    worst, compared, empty = 0.0, 0, 0
    for op in region:
        kind = plan.edits.get(op, op.kind)
        old[op] = graph.evaluate(op, op.kind, [old[parent] for parent in op.inputs])
        same = kind is op.kind and all(new[parent] is old[parent] for parent in op.inputs)
        try:
            new[op] = old[op] if same else graph.evaluate(op, kind, [new[parent] for parent in op.inputs])
        except _PROBLEMS as problem:
            raise _PlannedFailsError from problem
        if new[op] is not old[op] and (not op.users or any(user not in inside for user in op.users)):
            worst = max(worst, scale_error(new[op], old[op]))
            compared, empty = compared + bool(old[op].numel()), empty + (not old[op].numel())
    return worst if compared or not empty else None


def scale_error(candidate: Tensor, reference: Tensor) -> float:
    """Return max |candidate - reference| / max |reference|; infinity where only one is finite, or shapes differ."""
    if candidate.shape != reference.shape:
        return float("inf")
    if not reference.numel() or not reference.is_floating_point():
        return 0.0 if bool(torch.equal(candidate, reference)) else float("inf")
    finite = torch.isfinite(reference)
    if not bool(torch.equal(finite, torch.isfinite(candidate))) or not bool(finite.any()):
        return float("inf")
    difference = (candidate - reference)[finite].abs().max()
    scale = reference[finite].abs().max()
    return float(difference / scale) if scale > 0 else float(difference)
