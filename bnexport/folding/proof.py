"""Proof of one plan in float64, on its part of the graph, and the measure of an error that all proofs share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnexport.folding.graph import ConstantAffine, Graph, Layer, Op, Reshape, Slice
from bnexport.folding.plan import FoldPlan
from bnexport.optional import one_line

#: Rounding of float64 in a handful of operations stays below; the smallest real fault (a dropped eps) is far above.
MAX_SITE_ERROR = 1e-12
#: Largest number of positions per spatial axis of a probe, tried in turn: few if the kernels fit, at last as traced (None).
_LARGEST: tuple[int | None, ...] = (4, 12, None)
#: Exceptions of operators whose sizes do not fit.
_PROBLEMS = (RuntimeError, TypeError, ValueError, IndexError)


class _PlannedFailsError(Exception):
    """An operation runs unchanged, but not as planned."""


class NotComparedError(Exception):
    """No value of a plan could be compared; the reason is a sentence without its full stop."""


def plan_error(graph: Graph, plan: FoldPlan) -> float:
    """Return max |planned - unchanged| / max |unchanged| of the worst value outside a plan's own operations, in float64.

    Every value that leaves the plan's part of the graph is compared, also a value that the plan assumes to be unread, so that
    an overlooked reader shows. The backend's operators run on seeded noise that differs between channels. Images are cut to a
    few pixels if no operation depends on their size. The error is infinite if only the planned part can't be run.

    Raises:
        NotComparedError: The part can't be run at any size, or has no number to compare.
    """
    reason, fails = "it has no number to compare", False
    region = sorted(plan.path, key=lambda op: op.index)
    sizes: tuple[int | None, ...] = (None,) if _needs_full_size(region, plan) else _LARGEST
    for largest in sizes:
        try:
            error = _region_error(graph, plan, region, largest)
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
        stored = kind.affine.scale if isinstance(kind, ConstantAffine) else None
        stored = kind.after if isinstance(kind, Layer) else stored
        if stored is not None and stored.numel() > max(stored.shape, default=1):
            return True
    return False


def _region_error(graph: Graph, plan: FoldPlan, region: Sequence[Op], largest: int | None) -> float | None:
    """Return the largest difference; None if the values that leave the region have no elements."""
    generator = torch.Generator().manual_seed(0)
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
    """Return max |candidate - reference| / max |reference|; infinity if only one is finite, or if shapes differ."""
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
