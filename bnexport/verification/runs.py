"""Stages 2 and 3: run one runtime in one setting, and detect the precision of its kernels from the error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from bnexport.bundle import WEIGHTS
from bnexport.errors import BnexportError, BundleError
from bnexport.onnx_files.emulation import ROUNDINGS
from bnexport.quantization.integer_emulation import EXACT, SATURATING
from bnexport.runtimes.base import Runner, RunSettings
from bnexport.runtimes.replay import incomparable, scale
from bnexport.tensors import Array
from bnexport.verification.evidence import Evidence
from bnexport.verification.forecast import DECISIVE, FUNCTIONS
from bnexport.verification.inputs import Batch, Case, Outputs, each_once, heads
from bnexport.verification.int8 import labels_row, record_of
from bnexport.verification.metrics import SIGNIFICANT, accuracy_change, flipped_samples, labelled, per_sample
from bnexport.verification.prediction import compatible, detect
from bnexport.verification.stages import compare, failed
from bnexport.verification.verdict import REAL, FlippedSample, LayerDrift, Row


@dataclass(frozen=True)
class RuntimeRun:
    """Result of one runtime in one setting."""

    rows: tuple[Row, ...]  # Its checks
    description: Mapping[str, Any]  # Engine, version, device and providers that really ran
    #: The precision, or another way of rounding of that name that an error has shown (``Forecast.rounding_seen``)
    rounding: str
    #: Error and margin of each sample of the first batch (``metrics.per_sample``)
    samples: tuple[Array, Array] | None = None
    flipped: tuple[FlippedSample, ...] = ()  # Changed labels of the first batch
    drift: tuple[LayerDrift, ...] = ()  # Its layers in order of computation, where they were compared


def run_runtime(runner: Runner, settings: RunSettings, evidence: Evidence, *, file: str) -> RuntimeRun:
    """Run an open runtime on the golden vectors, every batch, other batch sizes and a second time, and judge its answers.

    ``file`` is the runtime's file; the original network (WEIGHTS) computes in float32 whatever the files do.
    """
    stored = "float32" if file == WEIGHTS else evidence.precision
    run = _RuntimeRun(runner, settings.precision if stored == "float32" else stored, evidence)
    planned = [(run.stage, case) for case in evidence.cases]
    if evidence.golden is not None:
        planned.insert(0, ("golden", evidence.golden))
    named = {case.batch.name: case for _, case in planned}  # golden vectors may be the only case; each case is run once
    found = each_once([case.batch for case in named.values()], run.outputs, together=run.varies)
    answers = dict(zip(named, found, strict=True))
    compared = [(stage, case, answers[case.batch.name]) for stage, case in planned]
    run.rounding = run.rounding_of(compared)
    if run.stage == "shipping":
        evidence.forecast.emulate(run.rounding, list(named.values()))
    rows = [run.judged(*item) for item in compared]
    if run.precision == EXACT:
        rows += run.against_emulation(compared)
    rows += run.batch_sizes(compared)
    rows += run.repeat()
    samples: tuple[Array, Array] | None = None
    flipped: tuple[FlippedSample, ...] = ()
    if (lead := run.lead) is not None and not isinstance(first := answers[lead.batch.name], BnexportError):
        row = rows[next(at for at, (stage, case, _) in enumerate(compared) if case is lead and stage == run.stage)]
        if row.error is not None and row.bound is not None:
            samples = per_sample(first, lead.expected, lead.scales)
            labels = evidence.labels
            flipped = flipped_samples(first, lead.expected, bound=row.bound, labels=labels, scales=lead.scales)
        rows += [*run.accuracy(lead, first), *run.labels(lead, first), *_precision_rows(run, lead, first, file)]
    where, how = runner.effective_device, settings.describe()
    marked = tuple(replace(row, device=where, settings=how) for row in rows)
    return RuntimeRun(marked, runner.description, run.rounding, samples, flipped)


class _RuntimeRun:
    """One open runtime with the evidence that it is judged by."""

    def __init__(self, runner: Runner, precision: str, evidence: Evidence) -> None:
        self.runner, self.precision, self.evidence = runner, precision, evidence
        self.rounding = precision
        self.lead = evidence.cases[0] if evidence.cases else None
        self.varies = isinstance(runner.signature.inputs[0].shape[0], str)
        #: 2 for IEEE float32, 3 for coarser precisions.
        self.stage = "strict" if precision == "float32" else "shipping"

    def outputs(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """Return the outputs of a batch that may be larger than the device's memory."""
        n, step = len(next(iter(feeds.values()))), self.evidence.budget.call
        if n <= step or not self.varies:
            return self.runner.run(feeds)
        parts = [
            self.runner.run({name: array[at : at + step] for name, array in feeds.items()}) for at in range(0, n, step)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def rounding_of(self, compared: Sequence[tuple[str, Case, Outputs | BnexportError]]) -> str:
        """Return the way of rounding that the first conclusive error shows."""
        for _, case, found in compared:
            if not isinstance(found, BnexportError):
                seen = self.evidence.forecast.rounding_seen(self.precision, case, found)
                if seen != self.precision:
                    return seen
        return self.precision

    def predicted(self, case: Case | None, *, exact: bool = False, on: Case | None = None) -> float | None:
        """Return the predicted noise of a batch; in strict float32 only where the fixed bound is too narrow (``exact``)."""
        if case is None or not (exact or self.stage == "shipping"):
            return None
        return self.evidence.forecast.noise(self.rounding, case, on=on)

    def judged(self, stage: str, case: Case, found: Outputs | BnexportError) -> Row:
        """Return the check of one batch."""
        if isinstance(found, BnexportError):
            # Refusing the smallest images is not a wrong answer: OpenVINO takes no window beyond the padded map.
            refused = case.batch.smallest and isinstance(found, BundleError)
            reason = f"this engine refuses the smallest size: {found.message}" if refused else found.message
            return Row(stage, self.runner.name, case.batch.name, passed=refused, reason=reason)
        row = self._row(stage, case, found, self.predicted(case, exact=case is self.lead))
        if not row.passed and row.predicted is None and row.error is not None:
            # The network's float32 noise may exceed the fixed bound.
            row = self._row(stage, case, found, self.predicted(case, exact=True))
        if not row.passed and row.predicted is not None and row.error is not None:
            part = case.worst(found, DECISIVE) if self.varies else case
            row = self._row(stage, case, found, self.predicted(case, exact=True, on=part))
        if not row.passed and row.predicted is not None and row.error is not None:
            functions = self.evidence.forecast.function_noise(self.runner.name, case)
            if functions is not None:
                predicted = row.predicted + FUNCTIONS * functions.error
                row = self._row(stage, case, found, predicted)
                return replace(row, reason=row.reason or str(functions))
        return row

    def _row(self, stage: str, case: Case, outputs: Outputs, predicted: float | None) -> Row:
        name = self.runner.name
        return compare(stage, name, case.batch.name, outputs, case.expected, scales=case.scales, predicted=predicted)

    def against_emulation(self, compared: Sequence[tuple[str, Case, Outputs | BnexportError]]) -> list[Row]:
        """Compare an int8 file's outputs with its integer emulation: the kernels compute what the file states."""
        rows, forecast = [], self.evidence.forecast
        for stage, case, found in compared:
            emulated = forecast.emulated(EXACT, case)
            if stage == "golden" or emulated is None or isinstance(found, BnexportError):
                continue
            part = replace(case.head(emulated.n), expected=emulated.outputs)
            rows.append(self._row("strict", part, heads(found, emulated.n), forecast.last_bit(case)))
        return rows

    def labels(self, case: Case, outputs: Outputs) -> list[Row]:
        """Compare the changed labels of an int8 file on the first batch, if real, with those that its noise explains."""
        if self.precision != EXACT or case.batch.name not in REAL:
            return []
        emulated, name = self.evidence.forecast.emulated(EXACT, case), labelled(case.expected)
        if emulated is None or name is None or name not in outputs:
            return []
        errors = emulated.outputs[name] - emulated.exact[name]
        allowed = record_of(self.evidence.bundle.manifest).get("allow_flips")
        row = labels_row(self.runner.name, case.batch.name, outputs[name], case.expected[name], errors, allowed=allowed)
        return [] if row is None else [row]

    def batch_sizes(self, compared: Sequence[tuple[str, Case, Outputs | BnexportError]]) -> list[Row]:
        """Compare the first 1, 2, 7, 64 samples alone with the same samples in a larger batch; check the shape for none."""
        batch = self.evidence.sizes
        if batch is None:
            return []
        whole = next((found for _, case, found in compared if case.batch is batch), None)
        if whole is None or isinstance(whole, BnexportError):
            reason = "the whole batch was not run" if whole is None else whole.message
            return [failed("batch-size", self.runner.name, f"batch {batch.n}", reason)]
        sizes = [size for size in self.evidence.budget.batch_sizes if size < batch.n]
        return [self._size(batch, whole, size) for size in [*sizes, *([0] if self.evidence.empty else [])]]

    def _size(self, batch: Batch, whole: Outputs, size: int) -> Row:
        name = self.runner.name
        try:
            alone = self.runner.run(batch.head(size).feeds)
        except BnexportError as error:
            # Refusing an empty batch is not a wrong answer; refusing a sample is a fault.
            reason = f"this engine refuses an empty batch: {error.message}" if size == 0 else error.message
            return Row("batch-size", name, f"batch {size}", passed=size == 0, reason=reason)
        if size:
            scales = {output: scale(array) for output, array in whole.items()}  # one sample may have small outputs
            return self._same("batch-size", f"batch {size} of {batch.n}", alone, heads(whole, size), scales)
        wrong = [output for output, array in whole.items() if alone[output].shape != (0, *array.shape[1:])]
        if wrong:
            return failed("batch-size", name, "batch 0", f"output {wrong[0]!r} has shape {alone[wrong[0]].shape}")
        shapes = ", ".join(str(array.shape) for array in alone.values())
        return Row("batch-size", name, "batch 0", passed=True, reason=f"shape {shapes}")

    def repeat(self) -> list[Row]:
        """Compare two runs of the same samples of the first batch, at most one call of them."""
        if self.lead is None:
            return []
        whole = self.lead.batch
        batch = whole.head(self.evidence.budget.repeat) if self.varies else whole
        try:
            first, second = self.runner.run(batch.feeds), self.runner.run(batch.feeds)
        except BnexportError as error:
            return [failed("repeat", self.runner.name, batch.name, error.message)]
        return [self._same("repeat", batch.name, second, first)]

    def _same(
        self, stage: str, case: str, one: Outputs, other: Outputs, scales: Mapping[str, float] | None = None
    ) -> Row:
        """Compare two answers of this runtime; the noise of float32 may exceed the fixed bound."""
        judged = partial(compare, stage, self.runner.name, case, one, other, scales=scales)
        row = judged(predicted=self.predicted(self.lead))
        if not row.passed and row.error is not None:
            row = judged(predicted=self.predicted(self.lead, exact=True))
        return row

    def accuracy(self, case: Case, outputs: Outputs) -> list[Row]:
        """Test whether the change of accuracy on the first batch, if labelled, is more than chance."""
        labels, name = self.evidence.labels, labelled(case.expected)
        if labels is None or name is None or name not in outputs or not np.isfinite(outputs[name]).all():
            return []
        found = accuracy_change(case.expected[name], outputs[name], labels[: case.batch.n])
        passed, reason = found.p >= SIGNIFICANT or found.won > found.lost, found.sentence()
        return [Row("accuracy-change", self.runner.name, case.batch.name, passed, reason, n=found.n)]


#: Precisions that an engine may use without reporting it; a half precision needs a cast, which the file would contain.
_LOOKED_FOR = ("float32", "tf32-convolutions", "tf32", "tf32-cut", "float16", "bfloat16")
#: If emulation is expensive, only these and the roundings of the requested precision are tried.
_AT_LEAST = ("float32", "tf32")


def _precision_rows(run: _RuntimeRun, case: Case, first: Outputs, file: str) -> list[Row]:
    """Compare the error on the first batch with the error that each precision would make; ``file`` is the runtime's file.

    The only row has the stage "precision". There is none where the model can't be emulated, or where the outputs can't be
    compared, which another row reports.
    """
    forecast = run.evidence.forecast
    requested = ROUNDINGS.get(run.precision, (run.precision,))
    if run.precision == EXACT and forecast.saturates():
        requested += (SATURATING,)
    names = dict.fromkeys((*(_LOOKED_FOR if forecast.cheap else _AT_LEAST), *requested))
    found = {name: emulated for name in names if (emulated := forecast.emulated(name, case)) is not None}
    if run.precision not in found:
        return []
    n = min(emulated.n for emulated in found.values())
    candidate = heads(first, n)
    # Kernels are compared with this file in float64, so that a fault of the file is not attributed to them. The original
    # network has other weights, so its reference is the original.
    exact = next(iter(found.values())).exact if file != WEIGHTS else case.expected
    expected = heads(exact, n)
    if any(name not in candidate or incomparable(name, candidate[name], expected[name]) for name in expected):
        return []
    outputs = {name: heads(emulated.outputs, n) for name, emulated in found.items()}
    seen = detect(candidate, expected, outputs, same_weights=file != WEIGHTS)
    passed = compatible(run.precision, seen)
    if not passed and (functions := forecast.function_noise(run.runner.name, case)) is not None:
        seen = detect(candidate, expected, outputs, same_weights=file != WEIGHTS, functions=functions.rms)
        passed = compatible(run.precision, seen)
    reason = f"{run.precision} requested: {seen.sentence}"
    return [Row("precision", run.runner.name, case.batch.name, passed, reason, n=n, detected=seen.precision)]
