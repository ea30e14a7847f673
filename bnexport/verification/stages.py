"""The stages: measure, judge, and one row for each comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BnexportError
from bnexport.runtimes.base import Runner
from bnexport.runtimes.float64 import Float64Evaluator
from bnexport.runtimes.onnx_file import declaration_problem, read_model
from bnexport.tensors import Array
from bnexport.verification.inputs import BATCH_SIZES, Batch
from bnexport.verification.metrics import Measurement, measure, per_sample
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import Row

_CHUNK = 1024
_Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Case:
    """A batch with the right answer.

    Attributes:
        batch: Inputs.
        expected: Output name -> (n, ...); float64 of the original, or the golden vectors.
        scales: Output name -> what errors are a share of; None: the largest |expected| of this batch.
    """

    batch: Batch
    expected: _Outputs
    scales: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Plan:
    """What every runtime is put through.

    Attributes:
        golden: The bundle's golden vectors; None when they can't be read.
        cases: The batches of stage 2.
        sizes: The batch whose first samples are run in other batch sizes; None when the batch dimension is fixed.
        empty: Whether zero samples have to work.
    """

    golden: Case | None
    cases: tuple[Case, ...]
    sizes: Batch | None
    empty: bool


def judge(stage: str, found: Measurement, *, bound: float) -> tuple[bool, str]:
    """The verdict on a measurement, and its reason: "" when it passes."""
    if found.problem:
        return False, found.problem
    if not found.error <= bound:  # NaN fails
        return False, f"error {found.error:.1e} of scale is above {bound:.0e} ({stage})"
    if found.flips is not None and found.flips.unexplained:
        return False, f"{found.flips.unexplained} labels flipped that the margin certifies"
    return True, ""


def compare(
    stage: str,
    subject: str,
    case: str,
    candidate: _Outputs,
    expected: _Outputs,
    *,
    scales: Mapping[str, float] | None = None,
) -> Row:
    """One row: measure, then judge by the stage's tolerance."""
    bound = TOLERANCES[stage].bound
    found = measure(candidate, expected, bound=bound, scales=scales)
    passed, reason = judge(stage, found, bound=bound)
    row = Row(stage, subject, case, passed, reason, n=found.n, bound=bound)
    if found.problem:
        return row
    return replace(row, error=found.error, max_abs=found.max_abs, rms=found.rms, flips=found.flips)


def failed(stage: str, subject: str, case: str, reason: str) -> Row:
    """The row of something that could not even be compared."""
    return Row(stage, subject, case, passed=False, reason=reason)


def integrity_rows(bundle: Bundle, problems: Mapping[str, str | None]) -> list[Row]:
    """One row per listed file, and one for each file that is not listed."""
    rows = [Row("integrity", name, "sha256", found is None, found or "", n=1) for name, found in problems.items()]
    return rows + [failed("integrity", name, "listed", f"{name} is not in the manifest") for name in bundle.strangers()]


def proof_rows(bundle: Bundle, cases: Sequence[Case], *, limit: int) -> list[Row]:
    """Stage 1: model.onnx in float64 against the reference, on the first ``limit`` samples of each case.

    What the file declares of itself is compared with the manifest before.
    """
    try:
        model = read_model(bundle.file(MODEL_ONNX))
        evaluator = Float64Evaluator(model)
    except BnexportError as error:
        return [failed("file-proof", MODEL_ONNX, "open", error.message)]
    problem = declaration_problem(model, bundle.manifest)
    rows = [Row("declaration", MODEL_ONNX, "signature", problem is None, problem or "", n=1)]
    for case in cases:
        n = min(limit, case.batch.n) if evaluator.varies else case.batch.n
        try:
            outputs: _Outputs = evaluator.evaluate(case.batch.head(n).feeds)
        except BnexportError as error:
            rows.append(failed("file-proof", MODEL_ONNX, case.batch.name, error.message))
            continue
        row = compare("file-proof", MODEL_ONNX, case.batch.name, outputs, _head(case.expected, n), scales=case.scales)
        rows.append(replace(row, device="float64 in numpy"))
    return rows


def runner_rows(runner: Runner, plan: Plan) -> tuple[list[Row], tuple[Array, Array] | None]:
    """Golden vectors, stage 2, batch sizes and a repeat on one runtime.

    Returns:
        The rows, and error and margin of each sample of the first batch of stage 2 (``metrics.per_sample``).
    """
    rows, samples = [], None
    if plan.golden is not None:
        rows.append(_run_and_compare("golden", runner, plan.golden)[0])
    for case in plan.cases:
        row, outputs = _run_and_compare("strict", runner, case)
        rows.append(row)
        if case is plan.cases[0] and row.error is not None:
            samples = per_sample(outputs, case.expected, case.scales)
    if plan.sizes is not None:
        rows += _batch_rows(runner, plan.sizes, empty=plan.empty)
    if plan.cases:
        rows.append(_repeat_row(runner, plan.cases[0].batch))
    return [replace(row, device=runner.effective_device) for row in rows], samples


def _run_and_compare(stage: str, runner: Runner, case: Case) -> tuple[Row, _Outputs]:
    try:
        outputs = run_in_chunks(runner, case.batch)
    except BnexportError as error:
        return failed(stage, runner.name, case.batch.name, error.message), {}
    row = compare(stage, runner.name, case.batch.name, outputs, case.expected, scales=case.scales)
    return row, outputs


def _batch_rows(runner: Runner, batch: Batch, *, empty: bool) -> list[Row]:
    """The first 1, 2, 7, 64 samples alone against the same samples in the whole batch, and the shape for none."""
    rows = []
    try:
        whole = runner.run(batch.feeds)
    except BnexportError as error:
        return [failed("batch-size", runner.name, f"batch {batch.n}", error.message)]
    for size in [size for size in BATCH_SIZES if size < batch.n] + ([0] if empty else []):
        try:
            alone = runner.run(batch.head(size).feeds)
        except BnexportError as error:
            # An engine that refuses an empty batch gives no wrong answer; one that refuses a sample is of no use.
            told = f"this engine refuses an empty batch: {error.message}" if size == 0 else error.message
            rows.append(Row("batch-size", runner.name, f"batch {size}", passed=size == 0, reason=told))
            continue
        rows.append(
            compare("batch-size", runner.name, f"batch {size} of {batch.n}", alone, _head(whole, size))
            if size
            else _empty_row(runner, alone, whole)
        )
    return rows


def _empty_row(runner: Runner, alone: _Outputs, whole: _Outputs) -> Row:
    wrong = [name for name, array in whole.items() if alone[name].shape != (0, *array.shape[1:])]
    if wrong:
        return failed("batch-size", runner.name, "batch 0", f"output {wrong[0]!r} has shape {alone[wrong[0]].shape}")
    shapes = ", ".join(str(array.shape) for array in alone.values())
    return Row("batch-size", runner.name, "batch 0", passed=True, reason=f"shape {shapes}")


def _repeat_row(runner: Runner, whole: Batch) -> Row:
    """Two runs of the same samples, at most one chunk of them."""
    varies = isinstance(runner.signature.inputs[0].shape[0], str)
    batch = whole.head(_CHUNK) if varies else whole
    try:
        first, second = runner.run(batch.feeds), runner.run(batch.feeds)
    except BnexportError as error:
        return failed("repeat", runner.name, batch.name, error.message)
    return compare("repeat", runner.name, batch.name, second, first)


def run_in_chunks(runner: Runner, batch: Batch) -> dict[str, Any]:
    """Outputs of a batch that may be larger than the device's memory takes at once."""
    if batch.n <= _CHUNK or isinstance(runner.signature.inputs[0].shape[0], int):
        return runner.run(batch.feeds)
    parts = [
        runner.run({name: array[at : at + _CHUNK] for name, array in batch.feeds.items()})
        for at in range(0, batch.n, _CHUNK)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _head(outputs: _Outputs, n: int) -> dict[str, Array]:
    return {name: array[:n] for name, array in outputs.items()}
