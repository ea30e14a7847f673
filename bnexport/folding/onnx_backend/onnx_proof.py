"""Proof of a folded ONNX model against the original, both in float64 by onnx's reference implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, ValueInfoProto, numpy_helper
from torch import Tensor

from bnexport.folding.proof import scale_error
from bnexport.folding.torch_backend.torch_proof import DEPTH
from bnexport.onnx_files.float64 import wide_evaluator
from bnexport.optional import one_line
from bnexport.tensors import Array

_BATCH = 2
#: Numbers for sizes that vary, the cheapest first; a network that halves its input often accepts only the larger ones.
_SIZES = (32, 64, 224)


class NotEvaluated(Exception):
    """The original can't be evaluated; the reason is a sentence without its full stop."""


def onnx_fold_error(
    original: ModelProto,
    folded: ModelProto,
    exact: Mapping[str, Tensor],
    inputs: Mapping[str, Sequence[int]] | None = None,
) -> float:
    """Return the largest difference of any output, as a fraction of that output's largest value.

    The folded model is evaluated with the folded tensors before their one rounding (``exact``: by initializer), so that the
    error is that of the algebra alone. The error is infinity if only the folded model can't be evaluated. ``inputs`` is as for
    ``fold_onnx``. NotEvaluated is raised if the original can't be evaluated, or not in float64.
    """
    before = evaluator(original)
    feeds, reference = first_that_works(before, original, 0, inputs)
    try:
        after = evaluator(folded, {name: tensor.numpy() for name, tensor in exact.items()})
        error = _difference(run(after, feeds), reference)
        if inputs and (other := _other_sizes(before, original, inputs)) is not None:
            error = max(error, _difference(run(after, other[0]), other[1]))
    except NotEvaluated:
        return float("inf")
    if not error <= 1e-12 and (narrow := _narrow_value(before, feeds)) is not None:
        raise NotEvaluated(f"onnx's reference implementation leaves float64 at {narrow!r}")
    return error


def last_digit_response(model: ModelProto, inputs: Mapping[str, Sequence[int]] | None = None) -> float:
    """Return the error that float64 rounding explains: see ``torch_proof.last_digit_response``."""
    rng = np.random.default_rng(1)

    def nudged(array: Array) -> Array:
        if array.dtype.kind != "f":
            return array
        wide = array.astype(np.float64)
        return np.asarray(wide * (1 + rng.choice((-1, 1), wide.shape) * np.finfo(np.float64).eps))

    engine = evaluator(model)
    feeds, reference = first_that_works(engine, model, 0, inputs)
    weights = {tensor.name: nudged(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    changed = run(engine, {name: nudged(value) for name, value in feeds.items()}), run(evaluator(model, weights), feeds)
    return DEPTH * max(_difference(outputs, reference) for outputs in changed)


def evaluator(model: ModelProto, weights: Mapping[str, Array] | None = None) -> Any:
    """Return a model with every float widened to float64, ready to run; ``weights`` replace initializers."""
    try:
        return wide_evaluator(model, weights)
    except Exception as error:  # NotImplementedError, RuntimeError, onnx's own
        raise NotEvaluated(one_line(error, 160)) from error


def run(engine: Any, feeds: Mapping[str, Array]) -> list[Array]:
    """Return the outputs in order; raise NotEvaluated if an operator fails on these inputs."""
    try:
        with np.errstate(all="ignore"):
            return list(engine.run(None, dict(feeds)))
    except Exception as error:  # numpy raises any class inside an operator
        raise NotEvaluated(one_line(error, 160)) from error


def example_feeds(
    model: ModelProto, seed: int, given: Mapping[str, Sequence[int]] | None = None, *, batch: int = _BATCH
) -> Iterator[dict[str, Array]]:
    """Yield random inputs for a model, floats in float64, with several choices for sizes that vary and are not given."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    samples = given or {}
    varies = any(
        not dim.HasField("dim_value")
        for value in inputs
        for dim in list(value.type.tensor_type.shape.dim)[1 + len(samples.get(value.name, ())) :]
    )
    for size in _SIZES if varies else _SIZES[:1]:
        rng = np.random.default_rng(seed)
        try:
            yield {value.name: _random(value, batch, size, rng, samples.get(value.name, ())) for value in inputs}
        except (MemoryError, ValueError) as error:
            raise NotEvaluated(f"an input of its sizes can't be made: {one_line(error, 100)}") from error


def first_that_works(
    engine: Any, model: ModelProto, seed: int, given: Mapping[str, Sequence[int]] | None = None
) -> tuple[dict[str, Array], list[Array]]:
    """Return the first example inputs that a model accepts, and its outputs; raise NotEvaluated if it accepts none."""
    refused = None
    for feeds in example_feeds(model, seed, given):
        try:
            outputs = run(engine, feeds)
        except NotEvaluated as error:
            refused = refused or error
            continue
        if not all(isinstance(output, np.ndarray) for output in outputs):
            raise NotEvaluated("it has an output that is not a tensor")
        finite = (not item.size or item.dtype.kind != "f" or bool(np.isfinite(item).any()) for item in outputs)
        if all(finite) and any(output.size for output in outputs):
            return feeds, outputs
        refused = NotEvaluated("it has no finite output for noise")
    raise refused or NotEvaluated("it accepts no input")


def _other_sizes(
    engine: Any, model: ModelProto, given: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Array], list[Array]] | None:
    """Return feeds and outputs for larger sizes than the given ones; None if the model accepts none or has none open."""
    declared = {value.name: list(value.type.tensor_type.shape.dim)[1:] for value in model.graph.input}
    if all(dim.HasField("dim_value") for name in given for dim in declared.get(name, ())):
        return None
    larger = {name: [size + _SIZES[0] for size in shape] for name, shape in given.items()}
    try:
        return first_that_works(engine, model, 0, larger)
    except NotEvaluated:
        return None


def _difference(candidate: Sequence[Array], reference: Sequence[Array]) -> float:
    pairs = ([torch.from_numpy(np.array(item)) for item in pair] for pair in zip(candidate, reference, strict=True))
    return max((scale_error(a, b) for a, b in pairs), default=0.0)


def _random(
    value: ValueInfoProto, batch: int, size: int, rng: np.random.Generator, sample: Sequence[int] = ()
) -> Array:
    """Return noise, or 0 and 1 for integers and flags, which are valid indices of every table."""
    kind = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or not kind.HasField("shape"):
        raise NotEvaluated(f"the file does not state the shape of its input {value.name!r}")
    open_sizes = [batch, *sample, *[size] * len(kind.shape.dim)]
    shape = [
        dim.dim_value if dim.HasField("dim_value") else open_size
        for dim, open_size in zip(kind.shape.dim, open_sizes, strict=False)
    ]
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    except KeyError as error:
        raise NotEvaluated(f"its input {value.name!r} has an unknown element type") from error
    if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return rng.integers(0, 2, size=shape).astype(dtype)
    if dtype.kind in "fV":
        return rng.standard_normal(shape)
    raise NotEvaluated(f"its input {value.name!r} is {dtype.name}")


def _narrow_value(engine: Any, feeds: Mapping[str, Array]) -> str | None:
    """Return the name of a float value that is not float64, or None."""
    with np.errstate(all="ignore"):
        values = dict(engine.run(None, dict(feeds), intermediate=True))
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fV" and value.dtype != np.float64:
            return str(name)
    return None
