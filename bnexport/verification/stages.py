"""The stages that need no engine, and the judgement that all stages share: measure, judge, one row per comparison.

Stage 1 proves model.onnx in float64 against the original, and model.pt and model.pt2 by the same function and by the weights of
model.onnx, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bnexport.bundle import MODEL_EXPORTED, MODEL_FLOAT32, MODEL_ONNX, MODEL_TORCHSCRIPT, Bundle
from bnexport.errors import BnexportError, Unavailable
from bnexport.onnx_files.models import declaration_problem, trained_tensors
from bnexport.optional import require
from bnexport.tensors import Array
from bnexport.verification.forecast import FACTOR, Forecast
from bnexport.verification.inputs import Case, Outputs, each_once
from bnexport.verification.metrics import Measurement, measure
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import Row

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor


#: Files of torch that a bundle may hold.
TORCH_PROOFS = (MODEL_TORCHSCRIPT, MODEL_EXPORTED)


#: Signature of ``Forecast.rounding``: (case, *, always=False) -> change of the outputs, of scale, by rounding the weights
Rounding = Callable[..., float | None]


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
        return False, f"{found.flips.unexplained} labels changed although the margin excludes it"
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
        return failed(
            stage, subject, case, "the values of this network overflow in this precision, as its emulation shows"
        )
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
            judged = partial(compare, "file-proof", name, case.batch.name, outputs, case.expected, scales=case.scales)
            row = judged(predicted=rounding(case))
            if not row.passed and row.predicted is None and row.error is not None:
                row = judged(predicted=rounding(case, always=True))
            if not row.passed and row.predicted is not None and row.error is not None:
                row = judged(predicted=rounding(case, always=True, on_all=True))
        except BnexportError as error:
            row = failed("file-proof", name, case.batch.name, error.message)
        rows.append(replace(row, device=device))
    return rows


def weights_row(model: ModelProto, name: str, tensors: Sequence[Tensor]) -> Row:
    """Look for every weight and bias of model.onnx's linear operators among the tensors of a file of another format.

    A tensor is identified by its type, its number of elements and its bits; or else by the bits in sorted order,
    so that a transposed tensor matches. The other stages check the order of elements. Equal tensors (biases of zeros) may be
    stored once, as TorchScript does. A bias of zeros may be missing: the ONNX exporter adds one to some layers.
    """
    from onnx import numpy_helper

    listed = trained_tensors(model)
    missing = {tensor.name: numpy_helper.to_array(tensor) for tensor in listed}
    arrays = [_plain(tensor) for tensor in tensors]
    for ordered in (False, True):
        keys = {_key(*item, ordered=ordered) for item in arrays} if missing else set()
        missing = {key: x for key, x in missing.items() if _key(x.dtype.name, x, ordered=ordered) not in keys}
    missing = {key: x for key, x in missing.items() if x.ndim != 1 or x.any()}
    reason = f"{name} holds the same {len(listed)} tensors bit for bit"
    if not listed:
        reason = f"{MODEL_ONNX} has no weight to compare"
    elif missing:
        named = ", ".join(map(repr, list(missing)[:3]))
        reason = f"{len(missing)} of {len(listed)} tensors are not the same in {name}: {named}"
    # A network without weights passes.
    return Row("weights", name, "bits", not missing, reason, n=len(listed))


def _plain(tensor: Tensor) -> tuple[str, Array]:
    """Return a tensor's type and its elements; bfloat16, which numpy lacks, as integers of the same bits."""
    import torch

    if tensor.dtype is torch.bfloat16:
        return "bfloat16", tensor.view(torch.int16).numpy()
    return str(tensor.numpy().dtype.name), tensor.numpy()


def _key(kind: str, array: Array, *, ordered: bool) -> tuple[str, int, bytes]:
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    return kind, array.size, hashlib.sha256(np.sort(bits).data if ordered else bits.data).digest()


def format_rows(
    bundle: Bundle, name: str, cases: Sequence[Case], *, model: ModelProto | None, rounding: Rounding
) -> list[Row]:
    """Prove model.pt or model.pt2: its weights are those of model.onnx, and it computes in float64 what the original computes.

    The result is one row of the stage "weights", if there is a ``model``, and one of "file-proof" per case. There may be no
    case. Unavailable if torch is missing.
    """
    require("torch", purpose=f"the proof of {name}")
    from bnexport.runtimes.torch_float64 import TorchFile, TorchFloat64Evaluator

    rows: list[Row] = []
    try:
        file = TorchFile.load(bundle.file(name))
        if model is not None:
            rows.append(weights_row(model, name, file.tensors))
        if not cases:
            return rows
        evaluator = TorchFloat64Evaluator(file, bundle.manifest.signature)
    except Unavailable:
        raise
    except BnexportError as error:
        if model is not None and not rows:
            rows.append(failed("weights", name, "bits", error.message))
        return [*rows, failed("file-proof", name, "open", error.message)]
    found = each_once([case.batch for case in cases], evaluator.evaluate, together=evaluator.varies)
    return rows + float64_rows(name, cases, found, rounding, device="float64 in torch")
