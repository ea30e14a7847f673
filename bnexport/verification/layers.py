"""When layers are looked at one by one, and what a failed row tells of it."""

from __future__ import annotations

from dataclasses import replace

from bnexport.bundle import MODEL_ONNX
from bnexport.errors import BnexportError
from bnexport.runtimes.catalogue import RunnerSpec
from bnexport.verification.drift import layer_drift
from bnexport.verification.findings import LayerDrift
from bnexport.verification.runs import Run
from bnexport.verification.work import Work

#: Samples that each layer is compared on.
_SAMPLES = 4
_STAGES = ("golden", "strict", "shipping")


def look_at_layers(spec: RunnerSpec, run: Run, work: Work, *, wanted: bool | None) -> tuple[LayerDrift, ...]:
    """Compare a runtime layer by layer, where that is asked for, cheap, or where the runtime failed.

    It is a diagnosis and no verdict: giving out every layer's value can keep an engine from fusing them. A failed row of
    the run is told the first layer that leaves its prediction.

    Args:
        spec: The runtime.
        run: After ``go``; the reason of its first failed row may grow.
        work: Bundle and forecast.
        wanted: True, False, or None for where it is cheap or the runtime failed.

    Returns:
        The layers in order; empty where they were not looked at, or the engine refuses.
    """
    failed = next((i for i, row in enumerate(run.rows) if not row.passed and row.stage in _STAGES), None)
    if wanted is False or spec.file != MODEL_ONNX or not run.plan.cases or not run.forecast.possible:
        return ()
    if wanted is None and failed is None and not run.forecast.cheap:
        return ()
    case = run.plan.cases[0]
    feeds = case.batch.head(min(_SAMPLES, run.forecast.limit)).feeds if run.varies else case.batch.feeds
    try:
        layers = layer_drift(work.bundle, spec, run.settings, feeds, precision=run.rounding)
    except BnexportError as error:
        if wanted:
            work.skipped[f"drift of {spec.name}"] = error.message
        return ()
    first = next((layer for layer in layers if layer.left), None)
    if failed is not None and first is not None:
        row = run.rows[failed]
        told = f"; the first layer off its prediction is {first.layer} ({first.operator}): {first.error:.1e} of scale"
        run.rows[failed] = replace(row, reason=row.reason + told)
    return layers
