"""A plan: the changes that remove an affine, found before anything is changed.

``pull`` makes an operation return the value that is already scaled and shifted. ``push`` makes all readers of a value compute
the same without its scale and shift. Both walk the graph through operations that commute (``propagation``) until a linear
layer absorbs the affine or an operation refuses. A refusal is a sentence, so each BatchNorm that stays has a reason. A plan is
proved before it is carried out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bnexport.folding.affine import Affine
from bnexport.folding.graph import Clamp, ConstantAffine, Graph, Identity, Kind, Layer, Op, Opaque, Slice, Weight

#: Values of ``apart`` and ``biases`` of a GrowthBudget, tried in turn and each stricter, until the result is within the budget.
ATTEMPTS = ((False, False), (True, False), (True, True))
#: Largest number of operations that one plan visits, dead ends included, and largest number in a row: bounds on the work per
#: BatchNorm and on Python's stack, far above the needs of real networks.
MAX_STEPS = 1024
MAX_DEPTH = 64


class Refused(Exception):
    """An affine can't take this path: a sentence without its full stop, and a change that the network's author could make."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass
class GrowthBudget:
    """Upper bound on the growth of the weights by copies of shared ones."""

    elements: int  # Number of elements of all weights of the original
    max_growth: float = 1.1  # Upper bound for the result, as a factor of ``elements``
    apart: bool = False  # Give separate weights even to calls that fold alike
    # Count the bias of a layer that had none. Usually the BatchNorm that goes frees more elements, but a BatchNorm whose other
    # call stays frees none.
    biases: bool = False
    added: int = 0  # Number of elements added so far
    _together: dict[tuple[Weight, bytes], Weight] = field(default_factory=dict)

    def folded(self, old: Weight | None, value: Tensor, dtype: torch.dtype, *, together: bool) -> Weight:
        """Return a folded weight, the same object for all calls that shared ``old`` and fold it into the same numbers.

        ``together`` is True if other calls are expected to fold alike. ``dtype`` is the element type of the stored weight.
        """
        new = Weight("", tuple(value.shape), dtype, lambda: value)
        if old is None or not (together or any(known is old for known, _ in self._together)):
            return new
        new.readers = old.readers
        return self._together.setdefault((old, hashlib.sha256(value.contiguous().numpy().tobytes()).digest()), new)


#: Kind -> two functions that move an affine across it; the table is in ``folding.propagation``. The first moves it from the
#: output to the inputs: ``(plan, op, kind, affine)``. The second moves it from one input to the output: ``(plan, op, kind,
#: index of the input, affine)``.
PropagationRules = Mapping[
    type[Kind], tuple[Callable[["FoldPlan", Op, Any, Affine], None], Callable[["FoldPlan", Op, Any, int, Affine], None]]
]


@dataclass(eq=False)
class FoldPlan:
    """The changes that remove one affine."""

    graph: Graph
    rules: PropagationRules
    budget: GrowthBudget
    _: KW_ONLY
    maps: bool = False  # Allow a shift to become a constant map over the positions that follow a zero-padded layer
    clamps: bool = False  # Allow an activation to get a separate bound in each channel
    fixed: Collection[Op] = ()  # Operations that must stay as they are
    # The result is written back into the existing layers: the plan may change their numbers and remove norms, but not copy a
    # weight, add a constant, or change an activation.
    in_place: bool = False
    edits: dict[Op, Kind] = field(default_factory=dict, init=False)  # The new function of each changed operation
    path: dict[Op, None] = field(default_factory=dict, init=False)  # Every visited operation, in the order of the walk
    into: dict[Op, None] = field(default_factory=dict, init=False)  # Operations that absorbed the affine
    grown: int = field(default=0, init=False)  # Number of elements that the plan adds to the weights
    _steps: int = field(default=0, init=False)
    _depth: int = field(default=0, init=False)

    def pull(self, op: Op, affine: Affine, reader: Op) -> None:
        """Make ``op`` return ``affine(op)`` to its only reader; after a ``Refused`` the plan is incomplete and dropped."""
        if not affine.has_scale and not affine.has_shift:
            return
        self._reach(op, reader)
        while isinstance(op.kind, Identity):  # also a folded BatchNorm; a loop, so that long chains need no deep stack
            reader, op = op, op.inputs[op.kind.index]
            self._reach(op, reader)
        self._depth += 1  # not restored after a refusal: attempt does that
        self.rules[type(op.kind)][0](self, op, op.kind, affine)
        self._depth -= 1

    def _reach(self, op: Op, reader: Op) -> None:
        if not isinstance(op.kind, Opaque):  # an opaque operation refuses with its own reason
            self._only_reader(op, reader)
        self.visit(op)

    def push(self, op: Op, affine: Affine) -> None:
        """Make every reader of ``op`` compute the same from a value to which ``affine`` was not applied."""
        if not affine.has_scale and not affine.has_shift:
            return
        if not op.users:
            raise Refused("its result is not used")
        for user in dict.fromkeys(op.users):
            places = [index for index, parent in enumerate(user.inputs) if parent is op]
            if len(places) > 1:
                raise Refused(f"{user.name} reads it {len(places)} times")
            self.visit(user)
            self._depth += 1
            self.rules[type(user.kind)][1](self, user, user.kind, places[0], affine)
            self._depth -= 1

    def visit(self, op: Op) -> None:
        """Record that the plan visits an operation; a second visit is refused, so that two changes can't meet."""
        if op in self.path:
            raise Refused(f"two paths from it meet again at {op.name}")
        if op in self.fixed:
            raise Refused(f"{op.name} stays as it is, because its own fold failed its proof")
        self._steps += 1
        if self._steps > MAX_STEPS or self._depth > MAX_DEPTH:
            raise Refused("too many operations would have to be crossed")
        self.path[op] = None

    def edit(self, op: Op, kind: Kind) -> None:
        """Record the new function of an operation; refuse other bounds of a clamp with ``in_place``."""
        if self.in_place and isinstance(kind, Clamp) and not kind.same_bounds(op.kind):
            raise Refused(f"{op.name} would need other bounds, and the bounds are in its module's code")
        self.edits[op] = kind

    def attempt(self, action: Callable[[], object]) -> Refused | None:
        """Run an action; if it is refused, restore the plan and return the refusal."""
        before = dict(self.edits), dict(self.path), dict(self.into), self.grown, self._depth
        try:
            action()
        except Refused as refused:
            self.edits, self.path, self.into, self.grown, self._depth = before
            return refused
        return None

    def layer(self, op: Op, layer: Layer, *, weight: Tensor | None, bias: Tensor | None, after: Tensor | None) -> None:
        """Give a layer new numbers, float64; None keeps the present ones."""
        new = {"weight": weight, "bias": bias}
        old = {"weight": layer.weight, "bias": layer.bias}
        together = self._clone(op, [old[name] for name, value in new.items() if value is not None])
        if self.in_place and (after is not None or (layer.bias is None and bias is not None)):
            raise Refused(f"its shift needs a bias, and {op.name} is called without one", "a bias there")
        if self.budget.biases and layer.bias is None and bias is not None:
            self.spend(bias.numel(), f"the bias that {op.name} would get")
        changes: dict[str, object] = {"after": after if after is not None else layer.after}
        for name, value in new.items():
            if value is not None:
                stored = self.storable(value, layer.weight.dtype, name)
                changes[name] = self.budget.folded(old[name], stored, layer.weight.dtype, together=together)
        if after is not None:
            self.storable(after, layer.weight.dtype, "bias")
        self.edit(op, replace(layer, **changes))  # type: ignore[arg-type]
        self.into[op] = None

    def norm(self, op: Op, affine: Affine, *, held: int = 0) -> None:
        """Give a norm another scale and shift, which must be finite in its element type.

        ``held`` is the number of elements merged into the norm. A scale per channel and a map of positions would give a much
        larger map, which is refused.
        """
        assert isinstance(op.kind, ConstantAffine)
        if affine.scale.numel() > op.kind.affine.scale.numel() + held:
            raise Refused(f"together with {op.name} it would vary along more axes than each of the two")
        if op.dtype is not None:
            self.storable(affine.scale, op.dtype, "scale")
            self.storable(affine.shift, op.dtype, "shift")
        self.edit(op, ConstantAffine(affine))

    def storable(self, value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
        """Return ``value`` if it is finite in its element type (float16 ends at 65504); refuse it otherwise."""
        # One pass: a sum of finite numbers in float64 is finite, and only a sum that is not needs a closer look.
        cast = value.to(dtype)
        if not math.isfinite(float(cast.sum(dtype=torch.float64))):
            if not bool(torch.isfinite(value).all()):
                raise Refused(f"the folded {what} is not finite", "a finite weight and bias there")
            if not bool(torch.isfinite(cast).all()):
                wider = "weights in float32 or bfloat16" if dtype is torch.float16 else ""
                raise Refused(f"the folded {what} does not fit into {dtype}", wider)
        if dtype is torch.float16 and what == "weight" and _underflows(value, cast):
            raise Refused(f"the folded {what} would lose its last digits in {dtype}", "weights in float32 or bfloat16")
        return value

    def _only_reader(self, op: Op, reader: Op) -> None:
        if len(op.users) == 1:
            return
        if isinstance(reader.kind, Slice) and all(_apart(reader, other) for other in op.users if other is not reader):
            for other in op.users:
                self.path.setdefault(other)
            return
        if all(other is reader for other in op.users):
            raise Refused(f"{reader.name} reads the output of {op.name} {len(op.users)} times")
        raise Refused(
            f"the output of {op.name} has a second consumer, which needs it as it is",
            "a separate layer for each consumer",
        )

    def _clone(self, op: Op, weights: Sequence[Weight | None]) -> bool:
        """Copy weights that other calls read as well, if the budget allows.

        Return True if the other calls will fold alike, so that all calls share the folded weight.
        """
        for weight in weights:
            if weight is not None and weight.made:
                self.spend(weight.made, f"the weight of {op.name} is computed from fewer numbers, and the folded one")
        shared = [weight for weight in weights if weight is not None and weight.readers > 1]
        if not shared:
            return False
        if not self.budget.apart and all(self._alike(op, weight) for weight in shared):
            return True
        if self.in_place:
            raise Refused(
                f"the weight of {op.name} is read {max(weight.readers for weight in shared)} times (a shared layer or"
                " parameter), and another reader needs it as it is",
                "a separate layer for each call",
            )
        more, calls = sum(weight.elements for weight in shared), max(weight.readers for weight in shared)
        what = f"the weight of {op.name} is used {calls} times (a shared layer or parameter), and a copy for this call"
        self.spend(more, what, in_all=(calls - 1) * more)
        return False

    def spend(self, more: int, what: str, *, in_all: int | None = None) -> None:
        """Take ``more`` elements from the budget; refuse if the budget has fewer.

        ``what`` is the start of a sentence. ``in_all`` counts the elements of all plans with the same need, for the hint.
        """
        budget, spent = self.budget, self.budget.added + self.grown
        if spent + more > (budget.max_growth - 1.0) * budget.elements:
            needed = 1 + (spent + (more if in_all is None else in_all)) / max(budget.elements, 1)
            raise Refused(
                f"{what} would exceed the size budget of {budget.max_growth:g}",
                f"--max-growth {math.ceil(needed * 100) / 100:.2f}",
            )
        self.grown += more

    def _alike(self, op: Op, weight: Weight) -> bool:
        """Return True if every call that reads a weight has the same affine as its only reader: all share one folded weight."""
        first: Affine | None = None
        readers = [o for o in self.graph.ops if isinstance(o.kind, Layer) and weight in (o.kind.weight, o.kind.bias)]
        if len(readers) < weight.readers:
            return False
        for other in readers:
            user = _next_norm(other)
            if user is None or not isinstance(user.kind, ConstantAffine):
                return False
            first = first or user.kind.affine
            if not first.equals(user.kind.affine):
                return False
        return op in readers


def _underflows(value: Tensor, cast: Tensor) -> bool:
    """Return True if rounding changes some row of a weight by more than the type's resolution: its numbers are too small."""
    if value.ndim < 2:
        return False
    taps = value.reshape(*value.shape[:2], -1)  # (rows, columns, all other axes)
    lost = (taps - cast.double().reshape(taps.shape)).abs()
    resolution = 2 * torch.finfo(cast.dtype).eps
    return any(bool((lost.amax(rest) > resolution * taps.abs().amax(rest)).any()) for rest in ((1, 2), (0, 2)))


def _next_norm(op: Op) -> Op | None:
    """Return the norm that is the only reader of a value, after identities."""
    while len(op.users) == 1:
        op = op.users[0]
        if isinstance(op.kind, ConstantAffine):
            return op
        if not isinstance(op.kind, Identity):
            return None
    return None


def _apart(slice_op: Op, other: Op) -> bool:
    """Return True if two readers take different positions of one axis."""
    here, there = slice_op.kind, other.kind
    if not isinstance(here, Slice) or not isinstance(there, Slice) or here.axis != there.axis:
        return False
    return here.stop <= there.start or there.stop <= here.start
