"""Readers of what cuts a value into pieces: Split, and SplitToSequence with the SequenceAt of each piece."""

from __future__ import annotations

from bnexport.folding.affine import Dim
from bnexport.folding.graph import Slice
from bnexport.onnx_folding.view import Reading, View


def read_split(view: View) -> list[Reading] | None:
    """One reading per output of a Split."""
    shape = view.shape()
    outputs = [view.context.shapes.of(name) for name in view.node.output]
    if shape is None or any(output is None for output in outputs):
        return None
    axis = int(view.attribute("axis", 0)) % len(shape)
    bounds = _bounds(shape, axis, [output[axis] for output in outputs if output is not None])
    if bounds is None:
        return None
    return [Reading(Slice(axis, start, stop), (view.input(0),)) for start, stop in bounds]


def read_piece(split: View, at: View) -> Reading | None:
    """A SequenceAt of a SplitToSequence."""
    shape, given, index = split.shape(), split.constant(1), at.constant(1)
    if shape is None or given is None or index is None or not split.attribute("keepdims", 1):
        return None
    axis = int(split.attribute("axis", 0)) % len(shape)
    size = shape[axis]
    if not isinstance(size, int):
        return None
    step = int(given.reshape(-1)[0])
    sizes: list[Dim] = (
        [int(item) for item in given]
        if given.ndim
        else [min(step, size - start) for start in range(0, size, max(step, 1))]
    )
    bounds = _bounds(shape, axis, sizes)
    if bounds is None:
        return None
    return Reading(Slice(axis, *bounds[int(index)]), (split.input(0),), nodes=(at.node,))


def _bounds(shape: tuple[Dim, ...], axis: int, sizes: list[Dim]) -> list[tuple[int, int]] | None:
    """Start and stop of each piece; None when a size varies, or they do not add up."""
    start, found = 0, []
    for size in sizes:
        if not isinstance(size, int):
            return None
        found.append((start, start + size))
        start += size
    return found if start == shape[axis] else None
