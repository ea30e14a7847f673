"""``bnexport.fold_onnx``: read an ONNX file, fold, write, prove, report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto
from torch import Tensor

from bnexport.errors import ExportError, ModelError, ProofError, UsageError
from bnexport.folding.engine import Engine, EngineResult
from bnexport.folding.fold import AMPLIFIES, DEFAULT_MAX_GROWTH, refuse_wrong
from bnexport.folding.fold_report import FoldReport, FoldRow, Reported
from bnexport.folding.onnx_backend.inventory import BATCH_NORM, count_batch_norms, is_batch_norm, label
from bnexport.folding.onnx_backend.onnx_graph import OnnxGraph
from bnexport.folding.onnx_backend.onnx_proof import NotEvaluated, last_digit_response, onnx_fold_error
from bnexport.folding.onnx_backend.onnx_writer import OnnxWriter
from bnexport.folding.onnx_backend.reading import MAX_BYTES, check_valid, is_fully_valid, read_source
from bnexport.folding.plan import ATTEMPTS, GrowthBudget
from bnexport.onnx_files.models import graphs_within, opset_of
from bnexport.onnx_files.normalisation import OLDEST_OPSET, join_sums, split_sums, upgraded
from bnexport.onnx_files.reshape_targets import simplify_reshapes
from bnexport.optional import one_line

#: Float64 rounding through a deep network stays below; the smallest real fault (a dropped eps) is far above.
_MAX_ERROR = 1e-9


@dataclass(frozen=True)
class OnnxFoldResult(Reported):
    """The result of ``fold_onnx``.

    Attributes:
        model: The folded model, of the same IR version and operator set; of operator set 7 if the file has an older one.
        report: The fold report, with one row per BatchNormalization. ``print(result)`` shows it.
        original: The model as it was read, external data included, in the common spelling.
        changed: True if ``model`` differs from ``original``.
        normalised: Names of the rows of ``onnx_files.normalisation.NORMALISATIONS`` that changed the file's spelling.
    """

    model: ModelProto
    report: FoldReport
    original: ModelProto
    changed: bool
    normalised: tuple[str, ...] = ()


def fold_onnx(
    source: str | Path | bytes | ModelProto,
    *,
    max_growth: float = DEFAULT_MAX_GROWTH,
    clamps: bool = False,
    prove: bool = True,
    inputs: Mapping[str, Sequence[int]] | None = None,
) -> OnnxFoldResult:
    """Fold every BatchNormalization of an ONNX file that can be folded exactly, and report what happened to each, and why.

    The rules are those of ``bnexport.fold``. ``source`` is never changed. Names of nodes, values, weights and outputs stay.
    A weight with other readers keeps its numbers, and the fold gets a copy under a new name. Arithmetic is in float64, rounded
    once to the weight's element type. A Reshape whose target is computed from sizes gets a constant target if that provably
    gives the same result (``onnx_files.reshape_targets``).

    Example:
        >>> import bnexport, onnx
        >>> result = bnexport.fold_onnx("network.onnx")
        >>> print(result.summary())
        1 of 1 BatchNorm call folded
        >>> onnx.save(result.model, "folded.onnx")

    Args:
        source: A file (external data next to it), its bytes, or a model.
        max_growth: As for ``bnexport.fold``.
        clamps: As for ``bnexport.fold``.
        prove: Check each fold separately, and the folded model against the original, in float64.
        inputs: Name of an input -> shape of one sample; the only input may have any name. These numbers replace sizes that the
            file leaves open while shapes are inferred and the fold is proved. The written file leaves them open.

    Returns:
        The folded model and its report, with a row for each BatchNormalization in functions and subgraphs too.

    Raises:
        UsageError: ``max_growth`` is below 1, or ``inputs`` does not fit the file.
        ModelError: Not a valid ONNX model, or of an operator set below 7 that onnx can't convert.
        ExportError: The result has 2 GB or more, which one file can't hold.
        ProofError: The folded model does not compute what the original does. That is a fault in bnexport.
    """
    if not max_growth >= 1.0:
        raise UsageError(f"max_growth is {max_growth:g}", remedy="Give a factor of 1 or more; 1 allows no copies")
    file = read_source(source)
    original, sizes = file.model, _sizes(file.model, inputs or {})
    readable = deepcopy(upgraded(original, file.name))
    if prove and opset_of(readable) != opset_of(original):
        _check_conversion(original, readable, file.name, sizes)
    sums = split_sums(readable)
    model, outcome, exact, growth = _fold_copy(readable, original, sizes, max_growth, clamps, prove)
    join_sums(model, sums)
    changed = simplify_reshapes(model) > 0 or exact is not None or opset_of(model) != opset_of(original)
    if changed:
        _check_written(original, model)
    rows = (*outcome.rows, *_inner_rows(original))
    error, unproved = _proof(original, model, exact or {} if changed else None, sizes) if prove else (None, ())
    report = FoldReport(rows, count_batch_norms(model), error, growth, (*outcome.warnings, *unproved))
    return OnnxFoldResult(model, report, original, changed, file.normalised)


def _fold_copy(
    readable: ModelProto,
    original: ModelProto,
    sizes: Mapping[str, Sequence[int]],
    max_growth: float,
    clamps: bool,
    prove: bool,
) -> tuple[ModelProto, EngineResult, dict[str, Tensor] | None, float]:
    """Return the folded copy, the engine's result, the folded tensors in float64 (None if unchanged), and the growth.

    The copy is folded again with stricter settings while it exceeds the budget.
    """
    before = max(OnnxGraph(readable, sizes).elements, 1)
    for apart, biases in ATTEMPTS:
        model = deepcopy(readable)
        graph = OnnxGraph(model, sizes)
        budget = GrowthBudget(before, max_growth, apart, biases)
        outcome = _run_engine(Engine(graph, budget, clamps=clamps, prove=prove), original)
        writer = OnnxWriter(graph)
        folded = writer.write(outcome.dropped)
        growth = OnnxGraph(model, sizes).elements / before
        if growth <= max_growth:
            break
    return model, outcome, writer.exact if folded else None, growth


def _sizes(model: ModelProto, inputs: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the requested shapes of one sample by input name; refuse inputs and shapes that the file does not have."""
    stored = {tensor.name for tensor in model.graph.initializer}
    values = {value.name: value.type.tensor_type for value in model.graph.input if value.name not in stored}
    if len(values) == len(inputs) == 1:
        inputs = dict(zip(values, inputs.values(), strict=True))
    for name, shape in inputs.items():
        if name not in values:
            raise UsageError(f"the file has the inputs {', '.join(values)}", remedy="Name each: --input NAME=3x224x224")
        sample = [dim.dim_value or "?" for dim in list(values[name].shape.dim)[1:]]
        fits = len(sample) == len(shape) and all(size in ("?", shape[axis]) for axis, size in enumerate(sample))
        if values[name].HasField("shape") and not fits:
            raise UsageError(
                f"{'x'.join(map(str, shape))} does not fit {name!r}, which the file declares as {'x'.join(map(str, sample))}",
                remedy="Give numbers for the sizes that vary, and leave the rest as it is",
            )
    return {name: tuple(shape) for name, shape in inputs.items()}


def _run_engine(engine: Engine, original: ModelProto) -> EngineResult:
    """Run the engine; turn its exceptions over a file that is not fully valid into a ModelError."""
    try:
        return engine.run()
    except (RuntimeError, ValueError, IndexError) as error:
        if is_fully_valid(original):
            raise
        raise ModelError(
            f"the sizes in the file contradict each other: {one_line(error, 160)}",
            remedy="Check the file with onnx.checker and full_check=True, or export it again",
        ) from error


def _proof(
    original: ModelProto,
    model: ModelProto,
    exact: Mapping[str, Tensor] | None,
    sizes: Mapping[str, Sequence[int]],
) -> tuple[float | None, tuple[str, ...]]:
    """Return the error of the whole model, 0 if nothing was changed, or None and the reason if nothing could be compared."""
    if exact is None:
        return 0.0, ()
    try:
        error = onnx_fold_error(original, model, exact, sizes)
        if not error <= _MAX_ERROR and math.isfinite(error) and error <= last_digit_response(original, sizes):
            return error, (AMPLIFIES,)
    except NotEvaluated as reason:
        return None, (f"the folded model as a whole could not be evaluated in float64: {reason}",)
    refuse_wrong("model", error, _MAX_ERROR, "float64")
    return error, ()


def _check_conversion(
    original: ModelProto, converted: ModelProto, name: str, sizes: Mapping[str, Sequence[int]]
) -> None:
    """Compare a file with its conversion to a newer operator set, in float64."""
    try:
        error = onnx_fold_error(original, converted, {}, sizes)
    except NotEvaluated:
        return  # the report then states the reason
    if not error <= _MAX_ERROR:
        raise ModelError(
            f"{name} uses operator set {opset_of(original)}, and onnx.version_converter changes its results by {error:.1e} of"
            " scale",
            remedy=f"Export the network again with operator set {OLDEST_OPSET} or newer",
        )


def _check_written(original: ModelProto, model: ModelProto) -> None:
    """Check that the written model is as valid as the original, also in the checker's full check."""
    if (size := model.ByteSize()) > MAX_BYTES:
        raise ExportError(
            f"the folded model has {size} bytes, but one file holds at most 2 GB", remedy="Fold it in parts"
        )
    if is_fully_valid(original) and not is_fully_valid(model):
        raise ProofError("the folded model is not valid ONNX", remedy="Please report it with the file")
    check_valid(model, "the folded model")


def _inner_rows(model: ModelProto) -> Iterator[FoldRow]:
    """Yield a row for each BatchNormalization outside the main graph, where no rule applies."""
    outside = "the same nodes outside of it"
    inner = [(graph.node, "the body of an If, Loop or Scan", outside) for graph in graphs_within(model.graph.node)]
    for function in model.functions:
        where = f"the body of the function {function.name}"
        groups = (function.node, *(graph.node for graph in graphs_within(function.node)))
        inner += [(group, where, "functions inlined (onnx.inliner)") for group in groups]
    for group, where, hint in inner:
        for node in filter(is_batch_norm, group):
            yield FoldRow(label(node), BATCH_NORM, "kept", reason=f"it is inside {where}", hint=hint)
