"""Height and width that vary: checks that the network allows it, and example inputs for tracing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnexport.errors import ExportError, UsageError
from bnexport.exporting.export_request import InputSpec, example_inputs
from bnexport.nn.calling import call_once
from bnexport.optional import quiet
from bnexport.tensors import Signature, other_sizes, size_axes

#: Below this size a network's last feature map may be one pixel wide, and torch.export treats a size of 1 as a constant.
_LARGE = 128
#: Largest difference from rounding in a deep float32 network, as a share of the largest output.
_ROUNDING = 1e-3


def larger_example(specs: tuple[InputSpec, ...]) -> tuple[InputSpec, ...]:
    """Return the inputs with small sizes doubled, for tracing: torch.export would treat an inner size of 1 as a constant."""
    small = [{axis: size for axis in _axes(spec) if (size := spec.shape[axis - 1]) < _LARGE} for spec in specs]
    return tuple(_enlarged(spec, change) for spec, change in zip(specs, small, strict=True))


def check_sizes_vary(module: nn.Module, specs: tuple[InputSpec, ...]) -> None:
    """Run a copy of the network on other image sizes, and refuse a network that accepts only one.

    The message names the size that can't vary, and the line at which another size fails.
    """
    words = {word for spec in specs for word in _axes(spec).values()}
    if not words:
        raise UsageError(
            "--dynamic-size is for image inputs, and no input here has a height and width", remedy="Leave it out"
        )
    if any(_problem(module, other) is None for other in _others(specs, words)):
        return
    for word in sorted(words):
        problems = [_problem(module, other) for other in _others(specs, {word})]
        if all(problem is not None for problem in problems) or len(words) == 1:
            sizes = sorted(
                {spec.shape[axis - 1] for spec in specs for axis, name in _axes(spec).items() if name == word}
            )
            raise ExportError(
                f"the {word} of the input of {type(module).__name__} is pinned to {' and '.join(map(str, sizes))}: with another"
                f" {word} it fails {problems[0]}",
                remedy="Leave --dynamic-size out",
            )
    raise ExportError(
        f"{type(module).__name__} accepts only the given height and width",
        remedy="Leave --dynamic-size out",
    )


def with_smallest_sizes(
    signature: Signature, module: nn.Module, folded: nn.Module, specs: tuple[InputSpec, ...]
) -> Signature:
    """Return the signature with the smallest sizes at which the graph equals the network; both are run on small inputs.

    The limits of torch.export (``signature_of``) do not cover every resizing, and are too strict for maps of one pixel. So
    smaller sizes are tried one by one, down to the first that does not fit. ``specs`` are the inputs in the requested size,
    which is refused if it is smaller: forward takes another branch there.
    """
    requested = signature.named_sizes({spec.name: own.shape for spec, own in zip(signature.inputs, specs, strict=True)})
    certain = signature.smallest
    sizes = _Sizes(signature, module, folded, specs)
    start = sizes.first_fit(certain, {dim: max(size, certain[dim]) for dim, size in requested.items()})
    found = sizes.first_fit({dim: sizes.smallest(dim, start) for dim in start}, start)
    for dim, size in requested.items():
        if size < found[dim]:
            raise ExportError(
                f"{type(module).__name__} takes another branch for a {dim} of {size} than for {found[dim]} and more",
                remedy="Leave --dynamic-size out, or give a larger --input",
            )
    return signature.with_smallest(found)


class _Sizes:
    """Compares a network and its graph on inputs of other sizes."""

    def __init__(
        self, signature: Signature, module: nn.Module, folded: nn.Module, specs: tuple[InputSpec, ...]
    ) -> None:
        self._signature, self._specs, self._folded = signature, specs, folded
        with quiet():
            self._module = copy.deepcopy(module)

    def first_fit(self, low: Mapping[str, int], high: dict[str, int]) -> dict[str, int]:
        """Return the first sizes that fit, all growing together from low to high; high if none fits before."""
        steps = range(max((high[dim] - low[dim] for dim in high), default=0))
        tries = ({dim: min(low[dim] + step, high[dim]) for dim in high} for step in steps)
        return next((tried for tried in tries if self.fit(tried)), high)

    def smallest(self, dim: str, start: dict[str, int]) -> int:
        """Return the smallest size of one dimension, decreased from the start as long as the sizes fit."""
        size = start[dim]
        while size > 1 and self.fit({**start, dim: size - 1}):
            size -= 1
        return size

    def fit(self, sizes: Mapping[str, int]) -> bool:
        """Return True if the network accepts these sizes, and the graph computes the same."""
        resized = []
        for spec, own in zip(self._signature.inputs, self._specs, strict=True):
            dims = zip(spec.sample_shape, own.shape, strict=True)
            resized.append(
                replace(own, shape=tuple(sizes[dim] if isinstance(dim, str) else size for dim, size in dims))
            )
        inputs = example_inputs(tuple(resized))
        theirs, ours = (call_once(model, inputs, on_itself=True) for model in (self._module, self._folded))
        return theirs.problem is None and ours.problem is None and _same(theirs.result, ours.result)


def _same(theirs: Any, ours: Any) -> bool:
    """Return True if two results differ by no more than rounding; another branch of forward differs by more."""
    pairs = zip(*(pytree.tree_leaves(result) for result in (theirs, ours)), strict=False)
    for one, other in pairs:
        if not isinstance(one, Tensor):
            continue
        if one.shape != other.shape:
            return False
        one, other = one.double(), other.double()
        scale = float(one.abs().max()) if one.numel() else 0.0
        if not torch.allclose(one, other, rtol=0, atol=_ROUNDING * scale, equal_nan=True):
            return False
    return True


def _others(specs: tuple[InputSpec, ...], words: set[str]) -> Iterator[tuple[InputSpec, ...]]:
    """Yield the inputs in other sizes; only the named dimensions change, by the same amount in every input."""
    for steps in other_sizes(sorted(words)):
        yield tuple(
            _enlarged(spec, {axis: steps[word] for axis, word in _axes(spec).items() if word in words})
            for spec in specs
        )


def _axes(spec: InputSpec) -> dict[int, str]:
    return size_axes(len(spec.shape) + 1)


def _enlarged(spec: InputSpec, change: dict[int, int]) -> InputSpec:
    """Return a copy with sizes made larger by an amount per axis, where the batch is axis 0."""
    return replace(spec, shape=tuple(size + change.get(axis, 0) for axis, size in enumerate(spec.shape, start=1)))


def _problem(module: nn.Module, specs: tuple[InputSpec, ...]) -> str | None:
    return call_once(module, example_inputs(specs)).problem
