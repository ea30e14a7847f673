"""The engine applies the first rule that fits to every BatchNorm call of a graph, and proves each fold before it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from bnexport.folding.branches import EQUATION, merge_affine, merge_convolution, merge_skip, sum_guests
from bnexport.folding.fold_report import FoldRow
from bnexport.folding.graph import ConstantAffine, Graph, Identity, Kind, Layer, NormCall, Op, WeightedSum
from bnexport.folding.plan import FoldPlan, GrowthBudget, Refused
from bnexport.folding.proof import MAX_SITE_ERROR, NotComparedError, plan_error
from bnexport.folding.propagation import PROPAGATION_RULES
from bnexport.folding.rules import RULES, Rule, equation_of, outcome_of

_BRANCHES = "parallel branches"


@dataclass
class _Site:
    """One BatchNorm call while the engine works on it."""

    op: Op
    call: NormCall
    row: FoldRow
    into: tuple[Op, ...] = ()


@dataclass
class EngineResult:
    """One row per call in the graph's order, a sentence per fold that failed its proof, and operations without a reader."""

    rows: tuple[FoldRow, ...]
    warnings: tuple[str, ...]
    dropped: tuple[Op, ...]


@dataclass
class Engine:
    """Folds one graph; its operations are changed in place."""

    graph: Graph
    budget: GrowthBudget
    clamps: bool = False  # Allow an activation to get a separate bound in each channel
    prove: bool = True  # Check each fold separately before it is made
    in_place: bool = False  # Write into the existing layers; no branches are merged, since that removes operations
    sites: list[_Site] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: dict[Op, None] = field(default_factory=dict)
    failed: set[Op] = field(default_factory=set)

    def run(self) -> EngineResult:
        """Fold every call that can be folded exactly: by the rules, by merging parallel branches, then the rest by the rules.

        A merged branch may open a path for a call that was refused before.
        """
        self.sites = [_Site(op, op.norm, _first_row(op.norm)) for op in self.graph.ops if op.norm is not None]
        for site in self.sites:
            self._fold(site)
        if not self.in_place:
            merged = [site for site in self._left() if self._merge_affine(site)]
            if self._merge_convolutions() or merged:
                for site in self._left():
                    self._fold(site)
        by_op = {site.op: site for site in self.sites}
        rows = tuple(self._row(site, by_op) for site in self.sites)
        return EngineResult(rows, tuple(self.warnings), tuple(self.dropped))

    def push_scale(self, op: Op, stored: torch.dtype) -> bool:
        """Move a scale into all of its readers; False, and nothing changed, where that is not exact.

        ``stored`` is the element type in which the weights are written, if it is narrower than that of the graph.
        """
        assert isinstance(op.kind, ConstantAffine)
        plan = self._plan()
        plan.path[op] = None
        plan.edit(op, Identity())
        try:
            plan.push(op, op.kind.affine.scale_alone())
            for kind in plan.edits.values() if stored is torch.float16 else ():
                if isinstance(kind, Layer):
                    plan.storable(kind.weight.load(), stored, "weight")
            if not plan_error(self.graph, plan) <= MAX_SITE_ERROR:
                return False
        except (Refused, NotComparedError):
            return False
        self._carry_out(plan)
        return True

    def _left(self) -> list[_Site]:
        affine = [site for site in self.sites if site.row.outcome == "affine" and site.op not in self.failed]
        return [site for site in affine if isinstance(site.op.kind, ConstantAffine)]

    def _plan(self, *, maps: bool = False) -> FoldPlan:
        return FoldPlan(
            self.graph,
            PROPAGATION_RULES,
            self.budget,
            maps=maps,
            clamps=self.clamps,
            fixed=self.failed,
            in_place=self.in_place,
        )

    def _fold(self, site: _Site) -> None:
        """Use the first rule whose plan is not refused and whose proof holds; otherwise record the reasons."""
        if not isinstance(site.op.kind, ConstantAffine):
            return
        refusals: list[tuple[Rule, Refused]] = []
        self._take_in_arithmetic(site)
        if not self.in_place:
            self._merge_skips(site)
        for rule in RULES:
            if rule.maps and self.in_place:
                continue
            kind: Kind = site.op.kind
            if not isinstance(kind, ConstantAffine) or site.op in self.failed:
                return
            plan = self._plan(maps=rule.maps)
            plan.path[site.op] = None
            try:
                rule.plan(plan, site.op, kind.affine)
            except Refused as refused:
                refusals.append((rule, refused))
                continue
            error = self._proved(site, plan)
            if error is None:
                return
            name, equation = rule.name, equation_of(rule, plan)
            if not plan.into:
                name, equation = "nothing to move", "s = 1, t = 0 wherever it is read"
            reason, hint = _why(refusals, rule)
            outcome = outcome_of(rule, plan, site.op)
            site.row = replace(
                site.row, outcome=outcome, rule=name, equation=equation, error=error, reason=reason, hint=hint
            )
            site.into = (*site.into, *plan.into)  # the scale may have been folded before, and the shift is folded now
            self._carry_out(plan)
            return
        reason, hint = _why(refusals, None)
        site.row = replace(site.row, outcome="affine", reason=reason, hint=hint)

    def _proved(self, site: _Site, plan: FoldPlan) -> float | None:
        """Return a plan's error; if it is too large, keep the call, record the reason in its row, and return None."""
        try:
            error = self._error(site, plan)
            what = f"a fold failed its proof ({error:.1e} of scale in float64)"
        except NotComparedError as reason:
            error, what = math.inf, f"its fold could not be proved: {reason}"
        if error <= MAX_SITE_ERROR:
            return error
        site.row = replace(site.row, outcome="kept", reason=what, hint="", rule="", equation="", error=None)
        self.failed.add(site.op)  # from now on nothing is merged into it or moved across it
        return None

    def _error(self, site: _Site, plan: FoldPlan) -> float:
        """Return a plan's error, and record a warning if it is too large."""
        error = plan_error(self.graph, plan) if self.prove else 0.0
        if not error <= MAX_SITE_ERROR:
            self.warnings.append(
                f"{site.call.module or site.op.name}: a fold failed its proof ({error:.1e} of scale in float64) and was rolled"
                " back; please report it with the model"
            )
        return error

    def _take_in_arithmetic(self, site: _Site) -> None:
        """Merge plain scales and shifts next to a BatchNorm into it, before the rules are tried."""
        while (chain := _arithmetic_before(site.op)) or (chain := _arithmetic_after(site.op)):
            other = chain[-1]
            assert isinstance(other.kind, ConstantAffine)
            assert isinstance(site.op.kind, ConstantAffine)
            here, there = site.op.kind.affine, other.kind.affine
            plan = self._plan()
            plan.path.update(dict.fromkeys((site.op, *chain)))
            try:
                both = here.after(there) if other.index < site.op.index else there.after(here)
                plan.norm(site.op, both, held=there.scale.numel())
            except Refused:
                return
            plan.edit(other, Identity())
            if self._proved(site, plan) is None:
                return
            self._carry_out(plan)

    def _merge_skips(self, site: _Site) -> None:
        """Merge skip connections before a site: ``conv(x) + x`` takes an affine in only as one convolution."""
        total = site.op.inputs[0]
        while len(total.users) == 1 and isinstance(total.kind, WeightedSum | Identity):
            plan = self._plan()
            try:
                merge_skip(plan, total)
            except Refused:
                return
            if self._proved(site, plan) is None:
                return
            self._carry_out(plan)

    def _merge_affine(self, site: _Site) -> bool:
        plan = self._plan()
        try:
            assert isinstance(site.op.kind, ConstantAffine)
            host = merge_affine(plan, site.op, site.op.kind.affine)
        except Refused:
            return False
        if (error := self._proved(site, plan)) is None:
            return False
        site.row = replace(
            site.row, outcome="merged", rule=_BRANCHES, equation=EQUATION, error=error, reason="", hint=""
        )
        site.into = (*site.into, host)
        self._carry_out(plan)
        return True

    def _merge_convolutions(self) -> bool:
        """Merge sums of convolutions that absorbed a BatchNorm into one convolution, the smaller kernels into the larger."""
        touched = {op for site in self.sites for op in site.into}
        merged = False
        for guest in sum_guests(self.graph.ops, touched):
            plan = self._plan()
            try:
                host = merge_convolution(plan, guest)
            except Refused:
                continue
            sites = [site for site in self.sites if guest in site.into]
            try:
                if not sites or guest in self.dropped or not self._error(sites[0], plan) <= MAX_SITE_ERROR:
                    continue  # the fold that was made before stays valid
            except NotComparedError:
                continue
            for site in sites:
                site.into = tuple(host if op is guest else op for op in site.into)
                site.row = replace(site.row, rule=f"{site.row.rule}, then {_BRANCHES}")
            self._carry_out(plan)
            merged = True
        return merged

    def _carry_out(self, plan: FoldPlan) -> None:
        self.budget.added += plan.grown
        for op, kind in plan.edits.items():
            if isinstance(op.kind, Layer) and isinstance(kind, Layer):
                for old, new in ((op.kind.weight, kind.weight), (op.kind.bias, kind.bias)):
                    if old is not None and new is not old:
                        old.readers -= 1
            if isinstance(op.kind, WeightedSum) and isinstance(kind, Identity):
                self._leave_out(op, op.inputs[1 - kind.index])
                kind = Identity()
            op.kind = kind

    def _leave_out(self, op: Op, parent: Op) -> None:
        """Remove ``parent`` from the inputs of ``op``, and drop every operation that then has no reader."""
        op.inputs = [item for item in op.inputs if item is not parent]
        stack = [(op, parent)]
        while stack:
            reader, value = stack.pop()
            value.users.remove(reader)
            if not value.users:
                self.dropped[value] = None
                stack += [(value, above) for above in value.inputs]

    def _row(self, site: _Site, by_op: Mapping[Op, _Site]) -> FoldRow:
        """Return the finished row, with the final place of the scale and shift, which may have moved several times."""
        names: dict[str, None] = {}
        stack, seen = list(reversed(site.into)), set()
        while stack:
            op = stack.pop()
            other = by_op.get(op)
            if other is not None and other.into and op not in seen and other.row.gone:
                seen.add(op)
                stack += reversed(other.into)
            else:
                names[_name(op)] = None
        return replace(site.row, into=", ".join(names))


def _arithmetic_before(site: Op) -> list[Op]:
    """Return the chain of identities up to plain arithmetic that only the site reads; empty if there is none."""
    chain, op = [], site.inputs[0]
    while len(op.users) == 1 and op.shape == site.shape:
        chain.append(op)
        if isinstance(op.kind, ConstantAffine) and op.norm is None:
            return chain
        if not isinstance(op.kind, Identity):
            return []
        op = op.inputs[op.kind.index]
    return []


def _arithmetic_after(site: Op) -> list[Op]:
    """Return the chain as ``_arithmetic_before``, but with the data flow."""
    chain, op = [], site
    while len(op.users) == 1 and op.users[0].shape == site.shape:
        op = op.users[0]
        chain.append(op)
        if isinstance(op.kind, ConstantAffine) and op.norm is None:
            return chain
        if not isinstance(op.kind, Identity) or len(op.inputs) != 1:
            return []
    return []


def _first_row(call: NormCall) -> FoldRow:
    row = FoldRow(call.module, call.kind, "kept", channels=call.channels)
    if call.affine is None:
        return replace(row, reason=call.why_not, hint=call.hint)
    size = call.affine.scale.abs()
    low, high = float(size.min()), float(size.max())
    gain = (low, high) if math.isfinite(low + high) else None  # JSON has no infinity
    return replace(row, gain=gain, dead=int((size == 0).sum()))


def _why(refusals: Sequence[tuple[Rule, Refused]], used: Rule | None) -> tuple[str, str]:
    """Return reason and hint for a call that is not gone, from the refusals before it and after it."""
    if used is not None and used.outcome is None:
        return "", ""
    first = {rule.name: refused for rule, refused in refusals}
    before, after = first.get(RULES[0].name), first.get(RULES[1].name)
    parts = [f"{side}: {refused.reason}" for side, refused in (("before", before), ("after", after)) if refused]
    hints = [refused.hint for refused in (after, before) if refused and refused.hint]
    hints += [refused.hint for _, refused in refusals if refused.hint.startswith("--")]
    return "; ".join(parts), "; or ".join(dict.fromkeys(hints))


def _name(op: Op) -> str:
    if op.norm is not None:
        return op.norm.module or op.name
    return op.path or op.name
