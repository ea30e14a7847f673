"""Stage 1 for the files beside model.onnx: the same weights, bit for bit, and the same function in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BnexportError, Unavailable
from bnexport.optional import require
from bnexport.verification.cases import Case, heads
from bnexport.verification.stages import compare, failed
from bnexport.verification.verdict import Row
from bnexport.verification.weights import weights_row


def format_rows(
    bundle: Bundle,
    name: str,
    cases: Sequence[Case],
    *,
    limit: int,
    rounding: Callable[[Case], float | None] = lambda _case: None,
) -> list[Row]:
    """Prove one file: its weights are those of model.onnx, and it computes in float64 what the original computes.

    Args:
        bundle: Holds the file and model.onnx, both as they were written.
        name: A key of ``weights.TENSORS``: model.pt or model.pt2.
        cases: Batches with the right answer.
        limit: Samples of each case.
        rounding: What rounding the weights to the file's type does to a case, as a share of scale, where the fixed bound
            does not cover it (half precision): ``Forecast.rounding``.

    Returns:
        One row of the stage "weights", where model.onnx is there, and one of "file-proof" per case.

    Raises:
        Unavailable: torch or onnx is not here.
    """
    require("torch", purpose=f"the proof of {name}")
    rows = _weights_rows(bundle, name) if MODEL_ONNX in bundle.manifest.files else []
    return rows + proof_of_weights(bundle, name, cases, limit=limit, rounding=rounding)


def proof_of_weights(
    bundle: Bundle,
    name: str,
    cases: Sequence[Case],
    *,
    limit: int,
    rounding: Callable[[Case], float | None] = lambda _case: None,
) -> list[Row]:
    """The file with all floats widened, evaluated by torch in float64, against the reference; as ``format_rows``.

    Raises:
        Unavailable: torch is not here.
    """
    require("torch", purpose=f"the proof of {name}")
    from bnexport.runtimes.torch_float64 import TorchFloat64Evaluator

    try:
        evaluator = TorchFloat64Evaluator(bundle.file(name), bundle.manifest.signature)
    except Unavailable:
        raise
    except BnexportError as error:
        return [failed("file-proof", name, "open", error.message)]
    rows = []
    for case in cases:
        n = min(limit, case.batch.n) if evaluator.varies else case.batch.n
        try:
            outputs = evaluator.evaluate(case.batch.head(n).feeds)
            predicted = rounding(case)
        except BnexportError as error:
            rows.append(failed("file-proof", name, case.batch.name, error.message))
            continue
        row = compare(
            "file-proof", name, case.batch.name, outputs, heads(case.expected, n),
            scales=case.scales, predicted=predicted,
        )  # fmt: skip
        rows.append(replace(row, device="float64 in torch"))
    return rows


def _weights_rows(bundle: Bundle, name: str) -> list[Row]:
    try:
        return [weights_row(bundle.file(MODEL_ONNX), bundle.file(name))]
    except Unavailable:
        raise
    except BnexportError as error:
        return [failed("weights", name, "bits", error.message)]
