"""Stage 1, the proof of fold and file: the written file, evaluated in float64, against the original in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bnexport.errors import ProofError
from bnexport.runtimes.float64 import Float64Evaluator
from bnexport.tensors import Array
from bnexport.verification.metrics import measure
from bnexport.verification.tolerances import TOLERANCES


def prove_file(source: bytes | Path, feeds: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """Error of scale of a written ONNX file, evaluated in float64.

    Args:
        source: The file, or its bytes.
        feeds: Input name -> (n, ...).
        expected: Output name -> (n, ...), float64, of the original network.

    Returns:
        max |file - expected| / max |expected|, worst output.

    Raises:
        BundleError: The file is not a model, or can't be evaluated.
        ProofError: The outputs can't be compared, or the evaluator left float64.
    """
    found = measure(Float64Evaluator(source).evaluate(feeds), expected, bound=TOLERANCES["file-proof"].bound)
    if found.problem:
        raise ProofError(f"the written file can't be proved: {found.problem}", remedy="Report this with the model")
    return found.error
