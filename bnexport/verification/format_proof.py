"""Stage 1 for the files beside model.onnx: the same weights, bit for bit, and the same function in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bnexport.bundle import Bundle
from bnexport.errors import BnexportError, Unavailable
from bnexport.optional import require
from bnexport.verification.cases import Case, Outputs
from bnexport.verification.stages import failed, float64_rows
from bnexport.verification.verdict import Row
from bnexport.verification.weights import weights_row

if TYPE_CHECKING:
    from onnx import ModelProto


def format_rows(
    bundle: Bundle,
    name: str,
    cases: Sequence[Case],
    *,
    model: ModelProto | None,
    limit: int,
    rounding: Callable[[Case], float | None] = lambda _case: None,
) -> list[Row]:
    """Prove one file: its weights are those of model.onnx, and it computes in float64 what the original computes.

    Args:
        bundle: Holds the file, as it was written.
        name: A key of ``weights.TENSORS``: model.pt or model.pt2.
        cases: Batches with the right answer.
        model: model.onnx as read; None where it can't be, so that no weights are compared.
        limit: Samples of each case.
        rounding: What rounding the weights to the file's type does to a case, as a share of scale, where the fixed bound
            does not cover it (half precision): ``Forecast.rounding``.

    Returns:
        One row of the stage "weights", where model.onnx is there, and one of "file-proof" per case.

    Raises:
        Unavailable: torch is not here.
    """
    require("torch", purpose=f"the proof of {name}")
    rows = [] if model is None else [_weights_row(model, bundle, name)]
    return rows + _proof(bundle, name, cases, limit, rounding)


def _weights_row(model: ModelProto, bundle: Bundle, name: str) -> Row:
    try:
        return weights_row(model, bundle.file(name))
    except Unavailable:
        raise
    except BnexportError as error:
        return failed("weights", name, "bits", error.message)


def _proof(
    bundle: Bundle, name: str, cases: Sequence[Case], limit: int, rounding: Callable[[Case], float | None]
) -> list[Row]:
    """The file with all floats widened, evaluated by torch in float64, against the reference."""
    from bnexport.runtimes.torch_float64 import TorchFloat64Evaluator

    try:
        evaluator = TorchFloat64Evaluator(bundle.file(name), bundle.manifest.signature)
    except Unavailable:
        raise
    except BnexportError as error:
        return [failed("file-proof", name, "open", error.message)]

    def evaluate(case: Case) -> tuple[int, Outputs]:
        n = min(limit, case.batch.n) if evaluator.varies else case.batch.n
        return n, evaluator.evaluate(case.batch.head(n).feeds)

    return float64_rows(name, cases, evaluate, rounding, device="float64 in torch")
