"""Height and width that vary: whether the network allows it at all, and an example to trace it with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from bnexport.errors import ExportError, UsageError
from bnexport.exporting.request import InputSpec, example_inputs
from bnexport.nn.calling import call_once
from bnexport.optional import quiet
from bnexport.tensors import Signature, other_sizes, size_axes

#: Below this a network's last feature map may be one pixel wide, which torch.export takes for a constant.
_LARGE = 128


def larger_example(specs: tuple[InputSpec, ...]) -> tuple[InputSpec, ...]:
    """The inputs with small sizes doubled, to trace with: a size of 1 somewhere inside must not be taken for a constant."""
    return tuple(
        _resized(spec, {axis: 2 for axis in _axes(spec) if spec.shape[axis - 1] < _LARGE}, times=True) for spec in specs
    )


def check_sizes_vary(module: nn.Module, specs: tuple[InputSpec, ...]) -> None:
    """Refuse a network that takes one size of image only; a copy of it is run on others.

    Args:
        module: The user's network; never changed.
        specs: Its inputs.

    Raises:
        UsageError: No input is an image.
        ExportError: Naming the size that can't vary, and the line at which another one fails.
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
                f" one it fails {problems[0]}",
                remedy="Leave --dynamic-size out",
            )
    raise ExportError(
        f"{type(module).__name__} takes no other height and width together than those given",
        remedy="Leave --dynamic-size out",
    )


def with_smallest_sizes(signature: Signature, module: nn.Module, specs: tuple[InputSpec, ...]) -> Signature:
    """The signature with the smallest sizes that the network itself takes; a copy of it is run on small inputs.

    The graph knows most limits (``signature_of``), but not every resizing's, and engines refuse fewer sizes than torch does.

    Args:
        signature: With names for the sizes that vary.
        module: The user's network; never changed.
        specs: Its inputs, in the size that was asked for.

    Raises:
        ExportError: The size asked for is smaller than the graph's smallest: forward takes another way there.
    """
    asked = {
        dim: size
        for spec, own in zip(signature.inputs, specs, strict=True)
        for dim, size in zip(spec.sample_shape, own.shape, strict=True)
        if isinstance(dim, str)
    }
    least = {dim: size for spec in signature.inputs for dim, size in spec.smallest.items()}
    for dim, size in asked.items():
        if size < least[dim]:
            raise ExportError(
                f"{type(module).__name__} computes something else for a {dim} of {size} than from {least[dim]} on",
                remedy="Leave --dynamic-size out, or give a larger --input",
            )

    with quiet():
        copied = copy.deepcopy(module)

    def taken(sizes: Mapping[str, int]) -> bool:
        at = (
            replace(
                own,
                shape=tuple(sizes.get(str(dim), size) for dim, size in zip(spec.sample_shape, own.shape, strict=True)),
            )
            for spec, own in zip(signature.inputs, specs, strict=True)
        )
        return call_once(copied, example_inputs(tuple(at)), on_itself=True).problem is None

    alone = {
        dim: next((size for size in range(least[dim], most) if taken({**asked, dim: size})), most)
        for dim, most in asked.items()
    }
    steps = range(max(asked[dim] - size for dim, size in alone.items()) + 1)
    tries = ({dim: min(size + step, asked[dim]) for dim, size in alone.items()} for step in steps)
    found = next((sizes for sizes in tries if taken(sizes)), asked)
    return replace(
        signature,
        inputs=tuple(
            replace(spec, smallest={dim: size for dim, size in found.items() if dim in spec.shape})
            for spec in signature.inputs
        ),
    )


def _others(specs: tuple[InputSpec, ...], words: set[str]) -> Iterator[tuple[InputSpec, ...]]:
    """The inputs in other sizes; only the named dimensions change, by the same amount in every input."""
    for steps in other_sizes(sorted(words)):
        yield tuple(
            _resized(spec, {axis: steps[word] for axis, word in _axes(spec).items() if word in words}) for spec in specs
        )


def _axes(spec: InputSpec) -> dict[int, str]:
    return size_axes(len(spec.shape) + 1)


def _resized(spec: InputSpec, change: dict[int, int], *, times: bool = False) -> InputSpec:
    """A copy with sizes (by the axis of the batch) made larger by an amount, or so many times."""
    sizes = {axis - 1: spec.shape[axis - 1] * by if times else spec.shape[axis - 1] + by for axis, by in change.items()}
    return replace(spec, shape=tuple(sizes.get(index, size) for index, size in enumerate(spec.shape)))


def _problem(module: nn.Module, specs: tuple[InputSpec, ...]) -> str | None:
    return call_once(module, example_inputs(specs)).problem
