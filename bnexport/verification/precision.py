"""Which precision was really in effect: read from the error itself, and compared with what was asked for."""

from __future__ import annotations

from bnexport.bundle import WEIGHTS
from bnexport.onnx_files.emulation import ROUNDINGS
from bnexport.runtimes.replay import incomparable
from bnexport.verification.inputs import heads
from bnexport.verification.prediction import compatible, detect
from bnexport.verification.runs import RuntimeRun
from bnexport.verification.verdict import Row

#: What an engine can have in effect without saying so; a half precision needs a cast, which the file would show.
_LOOKED_FOR = ("float32", "tf32-convolutions", "tf32", "tf32-cut", "float16", "bfloat16")
#: Where emulating costs more than the verdict is worth, only these and the ways of rounding of what was asked for are tried.
_AT_LEAST = ("float32", "tf32")


def precision_row(run: RuntimeRun, file: str) -> Row | None:
    """Compare the error on the first batch with what each precision would have made of it.

    Args:
        run: After ``go``.
        file: What the runtime read.

    Returns:
        A row of stage "precision"; None where nothing can be said: the model can't be emulated, or the outputs can't be
        compared (another row says why).
    """
    if not run.plan.cases or not run.first:
        return None
    case = run.plan.cases[0]
    asked = ROUNDINGS.get(run.precision, (run.precision,))
    names = dict.fromkeys((*(_LOOKED_FOR if run.forecast.cheap else _AT_LEAST), *asked))
    found = {name: emulated for name in names if (emulated := run.forecast.emulated(name, case)) is not None}
    if run.precision not in found:
        return None
    n = min(emulated.n for emulated in found.values())
    candidate = heads(run.first, n)
    # Kernels are judged by what they do to this very file, so that a fault of the file is not taken for theirs. The
    # original network has weights of its own, so its reference is the original.
    exact = next(iter(found.values())).exact if file != WEIGHTS else case.expected
    expected = heads(exact, n)
    if any(name not in candidate or incomparable(name, candidate[name], expected[name]) for name in expected):
        return None
    outputs = {name: heads(emulated.outputs, n) for name, emulated in found.items()}
    seen = detect(candidate, expected, outputs, same_weights=file != WEIGHTS)
    passed = compatible(run.precision, seen)
    reason = f"asked for {run.precision}: {seen.sentence}"
    return Row(
        "precision", run.runner.name, case.batch.name, passed, reason, n=n, detected=seen.precision,
        device=run.runner.effective_device, settings=run.settings.describe(),
    )  # fmt: skip
