"""Find the line of a user's forward that loses the batch, or from which another batch size takes another path.

``x.squeeze()`` drops a batch of 1, ``x.reshape(4, -1)`` writes the batch size as a number, ``x.view(-1, 8)`` mixes samples. The
network is run on batches of two sizes, and the shapes of all results are compared step by step.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bnexport.errors import UntracedError
from bnexport.nn.calling import INSTALLED, NOT_THEIRS, Outcome, call_once, place_of
from bnexport.optional import quiet

#: Two float32 sums of the same numbers differ by less than this share of the largest output.
_ROUNDING = 1e-3
#: Batch sizes to try if torch.export reports that forward depends on the batch size, the likely ones first.
_SIZES = (1, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65)
_RESHAPES = ("reshape", "view", "flatten", "unflatten")
_KEEP = "Keep the batch as the first axis there: take its size from x.shape[0], as in x.flatten(1) or x.reshape(x.shape[0], -1)"
_SQUEEZE = "Name the axes to drop, as squeeze((2, 3)), or write flatten(1): squeeze without them drops a batch of 1 too"
_NO_QUESTION = "Compute the same for every batch size there, without if or for on the batch size in Python"


@dataclass(frozen=True)
class _Step:
    """One call of torch in forward."""

    name: str  # Name of the function
    place: str  # " at FILE:LINE"; empty if no line of the user's code called the function
    shapes: tuple[tuple[int, ...], ...]  # Shapes of the results
    before: tuple[int, ...] | None  # Shape of the first tensor argument; None without one
    parents: tuple[int, ...]  # Numbers of the steps that made the arguments

    @property
    def where(self) -> str:
        """The line and the call, as the end of a sentence."""
        return f"{self.place or ' in forward'}: {self.name}"


class _Record(TorchFunctionMode):
    """Records every call of torch that returns tensors.

    With ``hold`` all tensors are kept, so that ``made`` and the steps' parents are known: Python reuses the id of a freed
    tensor.
    """

    def __init__(self, *, hold: bool) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._hold = hold
        self._made: dict[int, tuple[int, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [item for item in pytree.tree_leaves((args, kwargs or {})) if isinstance(item, Tensor)]
        parents = tuple(self._made[id(item)][0] for item in given if id(item) in self._made)
        result = func(*args, **(kwargs or {}))
        results = [item for item in pytree.tree_leaves(result) if isinstance(item, Tensor)]
        name = getattr(func, "__name__", "")
        if name == "__get__":  # x.T
            name = getattr(func.__self__, "__name__", name)
        if results:
            if self._hold:
                self._made.update((id(item), (len(self.steps), item)) for item in results)
            before = tuple(given[0].shape) if given else None
            self.steps.append(_Step(name, _place(), tuple(tuple(item.shape) for item in results), before, parents))
        return result

    def made(self, tensor: Tensor) -> int | None:
        """Return the number of the step that made a tensor."""
        found = self._made.get(id(tensor))
        return None if found is None else found[0]


def _place() -> str:
    """Return `` at FILE:LINE`` of the innermost running frame of the user's code; empty without such a frame."""
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    frame, installed = sys._getframe(2), ""
    while frame is not None and not frame.f_code.co_filename.startswith(own):
        file = frame.f_code.co_filename
        if not file.startswith(NOT_THEIRS):
            place = f" at {os.path.basename(file)}:{frame.f_lineno}"
            if INSTALLED not in file:
                return place
            installed = installed or place
        frame = frame.f_back  # type: ignore[assignment]
    return installed


@dataclass(frozen=True)
class _BatchRun:
    """A call with one batch size: its outcome and its steps."""

    size: int
    outcome: Outcome
    record: _Record

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors that forward returned."""
        return [item for item in pytree.tree_leaves(self.outcome.result) if isinstance(item, Tensor)]


def check_batch(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse a network whose output for one sample is not the output for a batch of 2 with one row less.

    A copy is run on ``inputs``, an example with a batch of 2. A network that fails on it is left to ``trace``. The error
    (UntracedError) names the line that drops the batch, writes its size, or reads it.
    """
    run = _runner(model, inputs)
    if run is None:
        return
    two, one = run(2), run(1)
    if two.outcome.problem is not None or not two.outputs:
        return
    name = type(model).__name__
    if one.outcome.problem is not None:
        raise (
            _irregular(model, one, two)
            or _written_size(model, one, two)
            or UntracedError(
                f"{name} takes a batch of 2, but fails on a batch of 1 {one.outcome.problem}", remedy=_KEEP
            )
        )
    if [tuple(item.shape) for item in one.outputs] != [(1, *item.shape[1:]) for item in two.outputs]:
        if error := _irregular(model, one, two) or _lost(model, run(2, hold=True)) or _lost(model, run(3, hold=True)):
            raise error
        return
    if _ways(one, two) is not None and not _same_row(one, two):  # a forward that caches takes another path once
        two, one = run(2), run(1)
        if (step := _ways(one, two)) is not None and not _same_row(one, two):
            raise _other_way(model, one.size, step)


def batch_problem(model: nn.Module, inputs: tuple[Any, ...]) -> UntracedError | None:
    """Return the reason, with its line, why a forward does not accept every batch size; None if no tried size shows one.

    A copy is run on ``inputs``, an example with a batch of 2.
    """
    run = _runner(model, inputs)
    if run is None:
        return None
    two = run(2)
    if two.outcome.problem is not None:
        return _written_size(model, two, run(3))
    for size in _SIZES:
        other = run(size)
        step = _ways(other, two)
        if other.outcome.problem is not None:
            return UntracedError(
                f"{type(model).__name__} takes a batch of 2, but fails on a batch of {size} {other.outcome.problem}",
                remedy=_KEEP,
            )
        if step is not None:
            return _other_way(model, size, step)
    return None


def _runner(model: nn.Module, inputs: tuple[Any, ...]) -> Callable[..., _BatchRun] | None:
    """Return a function that runs a copy on a number of samples; None for a module that can't be copied."""
    try:
        with quiet():
            copied = copy.deepcopy(model)
    except Exception:  # the module is the user's code
        return None

    def run(size: int, *, hold: bool = False) -> _BatchRun:
        record = _Record(hold=hold)
        with record:
            return _BatchRun(size, call_once(copied, _rows(inputs, size), on_itself=True), record)

    return run


def _rows(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Return inputs with another number of samples: the first ones, repeated if there are too few."""

    def rows(item: Any) -> Any:
        return item[torch.arange(size) % len(item)] if isinstance(item, Tensor) and item.ndim and len(item) else item

    return tuple(pytree.tree_map(rows, inputs))


def _irregular(model: nn.Module, one: _BatchRun, two: _BatchRun) -> UntracedError | None:
    """Return the error of the first step whose shape for one sample differs from that for two in more than the rows."""
    for here, there in _pairs(one, two):
        for small, large in zip(here.shapes, there.shapes, strict=False):
            fits = len(small) == len(large) and all(a in (b, b / 2) for a, b in zip(small, large, strict=True))
            if fits:
                continue
            remedy = _SQUEEZE if here.name.startswith("squeeze") else _KEEP
            return UntracedError(
                f"forward of {type(model).__name__} drops a batch of 1{here.where} gives {_text(small)} there, and"
                f" {_text(large)} for a batch of 2",
                remedy=remedy,
            )
    return None


def _lost(model: nn.Module, run: _BatchRun) -> UntracedError | None:
    """Return the error of the last step before an output that loses the batch as the first axis."""
    steps = run.record.steps
    for output in run.outputs:
        start = run.record.made(output) if output.ndim and output.shape[0] != run.size else None
        for number in _backwards(steps, start):
            step = steps[number]
            if step.before and step.before[0] == run.size and all(s and s[0] != run.size for s in step.shapes):
                return _without_batch(model, step)
    return None


def _written_size(model: nn.Module, few: _BatchRun, many: _BatchRun) -> UntracedError | None:
    """Return the error of the last step with the same number of rows for every batch size."""
    for here, there in reversed(list(_pairs(few, many))):
        lost = here.before and there.before and (here.before[0], there.before[0]) == (few.size, many.size)
        if lost and here.name in _RESHAPES and here.shapes[0][:1] == there.shapes[0][:1]:
            return _without_batch(model, here)
    return None


def _without_batch(model: nn.Module, step: _Step) -> UntracedError:
    assert step.before
    return UntracedError(
        f"forward of {type(model).__name__} loses the batch{step.where} gives {_text(step.shapes[0])} for"
        f" {_text(step.before)}, so its first axis is no longer the batch of {step.before[0]}",
        remedy=_KEEP,
    )


def _backwards(steps: list[_Step], start: int | None) -> Iterator[int]:
    """Yield the steps from which a result is made, the latest first."""
    seen: set[int] = set()
    stack = [] if start is None else [start]
    while stack:
        number = max(stack)
        stack.remove(number)
        yield number
        stack += [parent for parent in steps[number].parents if parent not in seen]
        seen.update(steps[number].parents)


def _ways(one: _BatchRun, two: _BatchRun) -> _Step | None:
    """Return the first step in which two runs differ; None if both take the same steps."""
    for here, there in zip(one.record.steps, two.record.steps, strict=False):
        if (here.name, here.place) != (there.name, there.place):
            return here
    few, many = sorted((one.record.steps, two.record.steps), key=len)
    return many[len(few)] if len(few) < len(many) and one.outcome.problem is two.outcome.problem is None else None


def _pairs(one: _BatchRun, two: _BatchRun) -> Iterator[tuple[_Step, _Step]]:
    """Yield the steps of two runs in pairs, as long as both take the same path."""
    for here, there in zip(one.record.steps, two.record.steps, strict=False):
        if (here.name, here.place) != (there.name, there.place):
            return
        yield here, there


def _same_row(one: _BatchRun, two: _BatchRun) -> bool:
    """Return True if the output for the first sample does not depend on the batch size."""
    for small, large in zip(one.outputs, two.outputs, strict=True):
        here, there = small.double(), large[:1].double()
        scale = float(there.abs().nan_to_num(posinf=0.0).max()) if there.numel() else 0.0
        if not torch.allclose(here, there, rtol=0, atol=_ROUNDING * scale, equal_nan=True):
            return False
    return True


def _other_way(model: nn.Module, size: int, step: _Step) -> UntracedError:
    place = step.place or place_of(None, model)
    return UntracedError(
        f"forward of {type(model).__name__} takes another path for a batch of {size} than for a batch of 2, from"
        f" {place.removeprefix(' at ') or 'its start'} on, but an exported file has only one path",
        remedy=_NO_QUESTION,
    )


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
