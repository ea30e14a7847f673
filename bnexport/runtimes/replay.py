"""Replay golden vectors on an open runner, for verification and a starting server."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnexport.bundle import Bundle, Manifest
from bnexport.errors import REBUILD, BundleError
from bnexport.runtimes.base import Runner
from bnexport.tensors import Array

#: Largest error of scale of a float32 file: golden outputs are float64 rounded once; the rest is the kernels' noise.
GOLDEN_BOUND = 1e-5
#: Largest bound of a bundle in half precision. Its noise is 1e-4 to 1e-2 of scale; an error of 0.1 means another network.
WIDEST_BOUND = 0.05
#: Largest bound of an int8 bundle: 3 times the noise of small networks, 0.01 to 0.1 of scale.
_WIDEST_INT8 = 0.4
#: Largest bound in float32, for networks whose float32 noise exceeds GOLDEN_BOUND.
_WIDEST_FLOAT32 = 1e-3


@dataclass(frozen=True)
class Replay:
    """Result of a replay of n samples."""

    n: int
    error: float  # max |answer - golden| / max |golden|, the worst output's
    bound: float  # The largest error that passes


def replay_golden(runner: Runner, bundle: Bundle) -> Replay:
    """Run a bundle's golden inputs on the runner that will be used, and compare its answers with the golden outputs.

    The bundle's hashes must have been checked. A BundleError reports other answers, or an unknown bound.
    """
    bound = golden_bound(bundle.manifest, runner.name)
    inputs, expected = bundle.golden()
    answers = runner.run(inputs)
    for name, values in expected.items():
        if (problem := incomparable(name, answers[name], values)) is not None:
            raise BundleError(
                f"{bundle.path}: {runner.name} can't be compared on the golden vectors: {problem}", remedy=REBUILD
            )
    error = max(largest_error(answers[name], values) for name, values in expected.items())
    if not error <= bound:  # NaN fails
        raise BundleError(
            f"{bundle.path}: {runner.name} has an error of {error:.1e} of scale on the golden vectors, "
            f"but at most {bound:.1e} is allowed",
            remedy="Run bnexport verify on the bundle on this machine; it reports which stage fails",
        )
    return Replay(len(next(iter(expected.values()))), error, bound)


def golden_bound(manifest: Manifest, runtime: str) -> float:
    """Return the allowed error of a runtime's answers to the golden inputs, as a share of scale.

    It is GOLDEN_BOUND, or the noise of the file's precision on this model if that is more. The noise was predicted at export,
    and is in the manifest's verdict, in the rows of kernels of the file's own precision. A BundleError refuses a bundle in half
    precision or int8 without a verdict that passed on a runtime of this engine.
    """
    engine, rows = runtime.rpartition("-")[0], manifest.verification.get("rows")
    found = [
        float(row["bound"])
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
        and (row.get("stage"), row.get("passed"), row.get("settings", "")) == ("golden", True, "")
        and isinstance(row.get("bound"), float)
        and str(row["subject"]).rpartition("-")[0] == engine
    ]
    if manifest.precision == "float32":
        return max(GOLDEN_BOUND, *(bound for bound in (*found, 0.0) if bound <= _WIDEST_FLOAT32))
    widest = _WIDEST_INT8 if manifest.precision == "int8" else WIDEST_BOUND
    if not found or not 0 < max(found) <= widest:
        raise BundleError(
            f"the bundle {manifest.name!r} has the precision {manifest.precision}, but was not verified on {engine} at export",
            remedy="Export it again where bnexport can verify it on that engine",
        )
    return max(GOLDEN_BOUND, *found)


def incomparable(name: str, candidate: Array, reference: Array) -> str | None:
    """Return why two arrays can't be compared, as a sentence without its full stop; None when they can."""
    if candidate.shape != reference.shape:
        return f"output {name!r} has shape {candidate.shape}, but the reference has {reference.shape}"
    if reference.size == 0:
        return f"output {name!r} is empty: nothing was compared"
    for whose, array in (("the reference", reference), ("the candidate", candidate)):
        if not np.isfinite(array).all():
            return f"output {name!r} of {whose} has {int((~np.isfinite(array)).sum())} values that are not finite"
    return None


def scale(reference: Array) -> float:
    """Return the largest |reference|, or 1 where all of it is zero."""
    return float(np.abs(reference.astype(np.float64)).max()) or 1.0


def largest_error(candidate: Array, reference: Array) -> float:
    """Return max |candidate - reference| / scale of arrays that can be compared."""
    return float(np.abs(candidate.astype(np.float64) - reference.astype(np.float64)).max()) / scale(reference)
