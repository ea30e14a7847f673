"""The stages that need no engine, and the judgement that all stages share: measure, judge, one row per comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from bnexport.bundle import MODEL_FLOAT32, MODEL_ONNX, Bundle
from bnexport.errors import BnexportError
from bnexport.onnx_files.models import declaration_problem
from bnexport.verification.forecast import FACTOR, Forecast
from bnexport.verification.inputs import Case, Outputs
from bnexport.verification.metrics import Measurement, measure
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import Row

if TYPE_CHECKING:
    from onnx import ModelProto


class Rounding(Protocol):
    """``Forecast.rounding``."""

    def __call__(self, case: Case, /, *, always: bool = False) -> float | None:
        """Return the change of the outputs, of scale, by rounding the weights."""


def judge(stage: str, found: Measurement, *, bound: float, predicted: float | None = None) -> tuple[bool, str]:
    """Return the verdict on a measurement, and its reason, "" when it passes; ``predicted`` noise gave the bound, if any."""
    if found.problem:
        return False, found.problem
    if not found.error <= bound:  # NaN fails
        of = f"error {found.error:.1e} of scale is"
        if predicted and bound > TOLERANCES[stage].bound:
            return False, f"{of} {found.error / predicted:.3g} x the predicted noise, allowed {FACTOR:g} x"
        return False, f"{of} above {bound:.0e} ({stage})"
    if found.flips is not None and found.flips.unexplained:
        return False, f"{found.flips.unexplained} labels flipped that the margin certifies"
    return True, ""


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
    """Measure, then judge by the stage's own bound, or by the precision's effect on this model where that is more.

    A prediction that is not finite (the precision overflows on this model) fails for every measurement.
    """
    if predicted == float("inf"):
        reason = "this precision can't hold the values of this network: its emulation overflows"
        return failed(stage, subject, case, reason)
    bound = max(TOLERANCES[stage].bound, FACTOR * (predicted or 0.0))
    found = measure(candidate, expected, bound=bound, scales=scales)
    passed, reason = judge(stage, found, bound=bound, predicted=predicted)
    row = Row(stage, subject, case, passed, reason, n=found.n, bound=bound, predicted=predicted)
    if found.problem:
        return row
    return replace(row, error=found.error, max_abs=found.max_abs, rms=found.rms, flips=found.flips)


def failed(stage: str, subject: str, case: str, reason: str) -> Row:
    """Return the row of an impossible comparison."""
    return Row(stage, subject, case, passed=False, reason=reason)


def integrity_rows(bundle: Bundle, problems: Mapping[str, str | None]) -> list[Row]:
    """Return one row per listed file, and one for each file that is not listed."""
    rows = [Row("integrity", name, "sha256", found is None, found or "", n=1) for name, found in problems.items()]
    return rows + [failed("integrity", name, "listed", f"{name} is not in the manifest") for name in bundle.unlisted()]


def proof_rows(bundle: Bundle, model: ModelProto, cases: Sequence[Case], forecast: Forecast) -> list[Row]:
    """Stage 1: compare model.onnx in float64 with the reference, on the front of each case.

    The file's declarations are compared with the manifest first. In half precision the rounding of the weights alone exceeds
    the fixed bound. Its effect on this model is measured, and is the bound.
    """
    problem = declaration_problem(model, bundle.manifest)
    declared = Row("declaration", MODEL_ONNX, "signature", problem is None, problem or "", n=1)
    found: list[Outputs | BnexportError] = []
    for case in cases:
        try:
            found.append(forecast.exact(case))
        except BnexportError as error:
            found.append(error)
    fronts = [forecast.front(case) for case in cases]
    name = proved_file(bundle)
    return [declared, *float64_rows(name, fronts, found, forecast.rounding, device="float64 in numpy")]


def proved_file(bundle: Bundle) -> str:
    """Return the file that is compared with the original in float64: model.onnx, or the float32 original of an int8 file."""
    return MODEL_FLOAT32 if bundle.manifest.precision == "int8" else MODEL_ONNX


def float64_rows(
    name: str,
    cases: Sequence[Case],
    found: Sequence[Outputs | BnexportError],
    rounding: Rounding,
    *,
    device: str,
) -> list[Row]:
    """Return one row of the stage "file-proof" per case; ``found`` has the outputs in float64, or why there are none.

    ``device`` is what evaluated the file.
    """
    rows = []
    for case, outputs in zip(cases, found, strict=True):
        try:
            if isinstance(outputs, BnexportError):
                raise outputs
            row = _proof_row(name, case, outputs, rounding(case))
            if not row.passed and row.predicted is None and row.error is not None:
                row = _proof_row(name, case, outputs, rounding(case, always=True))
        except BnexportError as error:
            row = failed("file-proof", name, case.batch.name, error.message)
        rows.append(replace(row, device=device))
    return rows


def _proof_row(name: str, case: Case, outputs: Outputs, predicted: float | None) -> Row:
    return compare("file-proof", name, case.batch.name, outputs, case.expected, scales=case.scales, predicted=predicted)
