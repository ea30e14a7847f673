"""The stages that need no engine, and the judgement that all stages share: measure, judge, one row per comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BnexportError
from bnexport.onnx_files.models import declaration_problem
from bnexport.verification.forecast import FACTOR, Forecast
from bnexport.verification.inputs import Case, Outputs, heads
from bnexport.verification.metrics import Measurement, measure
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import Row

if TYPE_CHECKING:
    from onnx import ModelProto


def judge(stage: str, found: Measurement, *, bound: float, predicted: float | None = None) -> tuple[bool, str]:
    """The verdict on a measurement, and its reason: "" when it passes.

    Args:
        stage: For the sentence.
        found: What was measured.
        bound: The largest error that passes.
        predicted: The predicted noise, where ``bound`` was made of it.
    """
    if found.problem:
        return False, found.problem
    if not found.error <= bound:  # NaN fails
        if predicted and bound > TOLERANCES[stage].bound:
            times = found.error / predicted
            return False, f"error {found.error:.1e} of scale is {times:.3g} x the predicted noise, allowed {FACTOR:g} x"
        return False, f"error {found.error:.1e} of scale is above {bound:.0e} ({stage})"
    if found.flips is not None and found.flips.unexplained:
        return False, f"{found.flips.unexplained} labels flipped that the margin certifies"
    return True, ""


def bound_of(stage: str, predicted: float | None) -> float:
    """What passes: the stage's own bound, or what the precision itself does to this model where that is more."""
    return max(TOLERANCES[stage].bound, FACTOR * (predicted or 0.0))


def compare(
    stage: str,
    subject: str,
    case: str,
    candidate: Outputs,
    expected: Outputs,
    *,
    scales: Mapping[str, float] | None = None,
    predicted: float | None = None,
) -> Row:
    """One row: measure, then judge by the stage's tolerance, or by the predicted noise where there is one.

    A prediction that is not finite (the precision overflows on this model) fails whatever was measured.
    """
    if predicted is not None and predicted == float("inf"):
        return failed(
            stage, subject, case, "this precision can't hold the values of this network: its emulation overflows"
        )
    bound = bound_of(stage, predicted)
    found = measure(candidate, expected, bound=bound, scales=scales)
    passed, reason = judge(stage, found, bound=bound, predicted=predicted)
    row = Row(stage, subject, case, passed, reason, n=found.n, bound=bound, predicted=predicted)
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


def proof_rows(bundle: Bundle, model: ModelProto, cases: Sequence[Case], forecast: Forecast) -> list[Row]:
    """Stage 1: model.onnx in float64 against the reference, on as many samples of each case as the forecast takes.

    What the file declares of itself is compared with the manifest before. In half precision the weights alone carry
    more rounding than the fixed bound allows; what that rounding does to this very model is measured, and is the bound.

    Args:
        bundle: Its model.onnx must be the one that was written.
        model: That file as read.
        cases: Batches with the right answer.
        forecast: Evaluates the file.
    """
    problem = declaration_problem(model, bundle.manifest)
    declared = Row("declaration", MODEL_ONNX, "signature", problem is None, problem or "", n=1)
    rows = float64_rows(MODEL_ONNX, cases, forecast.exact, forecast.rounding, device="float64 in numpy")
    return [declared, *rows]


def float64_rows(
    name: str,
    cases: Sequence[Case],
    evaluate: Callable[[Case], tuple[int, Outputs]],
    rounding: Callable[[Case], float | None],
    *,
    device: str,
) -> list[Row]:
    """One row of the stage "file-proof" per case.

    Args:
        name: The file.
        cases: Batches with the right answer.
        evaluate: The file in float64: how many samples from the front of the case, and output name -> (n, ...).
        rounding: ``Forecast.rounding``.
        device: What evaluated it.
    """
    rows = []
    for case in cases:
        try:
            n, outputs = evaluate(case)
            predicted = rounding(case)
        except BnexportError as error:
            rows.append(failed("file-proof", name, case.batch.name, error.message))
            continue
        row = compare(
            "file-proof", name, case.batch.name, outputs, heads(case.expected, n),
            scales=case.scales, predicted=predicted,
        )  # fmt: skip
        rows.append(replace(row, device=device))
    return rows
