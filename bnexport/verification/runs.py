"""Stages 2 and 3: run one runtime in one setting, and detect the precision of its kernels from the error."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bnexport.bundle import WEIGHTS
from bnexport.errors import BnexportError, BundleError
from bnexport.onnx_files.emulation import ROUNDINGS
from bnexport.runtimes.base import Runner, RunSettings
from bnexport.runtimes.replay import incomparable
from bnexport.tensors import Array
from bnexport.verification.forecast import Forecast
from bnexport.verification.inputs import BATCH_SIZES, Batch, Case, Outputs, RunPlan, heads
from bnexport.verification.metrics import SIGNIFICANT, accuracy_change, flipped_samples, has_labels, per_sample
from bnexport.verification.prediction import compatible, detect
from bnexport.verification.stages import compare, failed
from bnexport.verification.verdict import FlippedSample, Row

_CHUNK = 1024


@dataclass
class RuntimeRun:
    """One runtime, open, in one setting.

    Attributes:
        plan: The comparisons to run.
        forecast: Predicts the noise of its precision.
        stored: Precision of the runtime's file; float32 for the original network.
        samples: Error and margin of each sample of the first batch (``metrics.per_sample``).
        flipped: Changed labels of the first batch.
        first: Outputs of the first batch; empty when it could not be run.
        rounding: The precision, or another way of rounding of that name that an error has shown (``Forecast.rounding_seen``).
    """

    runner: Runner
    settings: RunSettings
    plan: RunPlan
    forecast: Forecast
    stored: str = "float32"
    rows: list[Row] = field(default_factory=list)
    samples: tuple[Array, Array] | None = None
    flipped: tuple[FlippedSample, ...] = ()
    first: Outputs = field(default_factory=dict)
    rounding: str = field(init=False)

    def __post_init__(self) -> None:
        self.rounding = self.precision

    @property
    def precision(self) -> str:
        """Return the expected precision: the file's, or that of the kernels for a float32 file."""
        return self.settings.precision if self.stored == "float32" else self.stored

    @property
    def varies(self) -> bool:
        """Return whether the batch dimension is free, so that a batch may be cut."""
        return isinstance(self.runner.signature.inputs[0].shape[0], str)

    @property
    def stage(self) -> str:
        """Return the stage: 2 for IEEE float32, 3 for coarser precisions."""
        return "strict" if self.precision == "float32" else "shipping"

    def go(self) -> None:
        """Run golden vectors, every batch, batch sizes, a repeat, and the change of accuracy."""
        if self.plan.golden is not None:
            self._case("golden", self.plan.golden)
        for case in self.plan.cases:
            self._case(self.stage, case)
        if self.plan.sizes is not None:
            self._batch_sizes(self.plan.sizes)
        if self.plan.cases:
            self._repeat(self.plan.cases[0].batch)
            self._accuracy(self.plan.cases[0])
        where, how = self.runner.effective_device, self.settings.describe()
        self.rows = [replace(row, device=where, settings=how) for row in self.rows]

    def _predicted(self, case: Case, *, exact: bool = False) -> float | None:
        """Return the predicted noise of a batch; in strict float32 only where the fixed bound is too narrow (``exact``)."""
        return self.forecast.noise(self.rounding, case) if exact or self.stage == "shipping" else None

    def _case(self, stage: str, case: Case) -> None:
        try:
            outputs = run_in_chunks(self.runner, case.batch)
        except BnexportError as error:
            # Who refuses the smallest images gives no wrong answer to them: OpenVINO takes no window beyond the padded map.
            refused = case.batch.smallest and isinstance(error, BundleError)
            told = f"this engine refuses so small an image: {error.message}" if refused else error.message
            self.rows.append(Row(stage, self.runner.name, case.batch.name, passed=refused, reason=told))
            return
        leads = bool(self.plan.cases) and case is self.plan.cases[0]
        row = self._judged(stage, case, outputs, exact=leads)
        if not row.passed and row.predicted is None and row.error is not None:
            row = self._judged(stage, case, outputs, exact=True)  # a network whose own float32 is that noisy
        self.rows.append(row)
        if leads and stage == self.stage:
            self.first = outputs
            self._look_closer(case, outputs, row)

    def _judged(self, stage: str, case: Case, outputs: Outputs, *, exact: bool) -> Row:
        if self.rounding == self.precision:
            self.rounding = self.forecast.rounding_seen(self.precision, case, outputs)
        return compare(
            stage, self.runner.name, case.batch.name, outputs, case.expected,
            scales=case.scales, predicted=self._predicted(case, exact=exact),
        )  # fmt: skip

    def _look_closer(self, case: Case, outputs: Outputs, row: Row) -> None:
        if row.error is None or row.bound is None:
            return
        self.samples = per_sample(outputs, case.expected, case.scales)
        self.flipped = flipped_samples(
            outputs, case.expected, bound=row.bound, labels=self.plan.labels, scales=case.scales
        )

    def _batch_sizes(self, batch: Batch) -> None:
        """Compare the first 1, 2, 7, 64 samples alone with the same samples in the whole batch; check the shape for none."""
        try:
            whole = self.runner.run(batch.feeds)
        except BnexportError as error:
            self.rows.append(failed("batch-size", self.runner.name, f"batch {batch.n}", error.message))
            return
        for size in [size for size in BATCH_SIZES if size < batch.n] + ([0] if self.plan.empty else []):
            try:
                alone = self.runner.run(batch.head(size).feeds)
            except BnexportError as error:
                # An engine that refuses an empty batch gives no wrong answer; one that refuses a sample is of no use.
                told = f"this engine refuses an empty batch: {error.message}" if size == 0 else error.message
                self.rows.append(Row("batch-size", self.runner.name, f"batch {size}", passed=size == 0, reason=told))
                continue
            self.rows.append(self._same(size, batch.n, alone, whole) if size else self._empty(alone, whole))

    def _same(self, size: int, n: int, alone: Outputs, whole: Outputs) -> Row:
        case = f"batch {size} of {n}"
        return compare(
            "batch-size", self.runner.name, case, alone, heads(whole, size), predicted=self._noise_of_first()
        )

    def _noise_of_first(self) -> float | None:
        return self._predicted(self.plan.cases[0]) if self.plan.cases else None

    def _empty(self, alone: Outputs, whole: Outputs) -> Row:
        name = self.runner.name
        wrong = [output for output, array in whole.items() if alone[output].shape != (0, *array.shape[1:])]
        if wrong:
            return failed("batch-size", name, "batch 0", f"output {wrong[0]!r} has shape {alone[wrong[0]].shape}")
        shapes = ", ".join(str(array.shape) for array in alone.values())
        return Row("batch-size", name, "batch 0", passed=True, reason=f"shape {shapes}")

    def _repeat(self, whole: Batch) -> None:
        """Compare two runs of the same samples, at most one chunk of them."""
        batch = whole.head(_CHUNK) if self.varies else whole
        try:
            first, second = self.runner.run(batch.feeds), self.runner.run(batch.feeds)
        except BnexportError as error:
            self.rows.append(failed("repeat", self.runner.name, batch.name, error.message))
            return
        self.rows.append(
            compare("repeat", self.runner.name, batch.name, second, first, predicted=self._noise_of_first())
        )

    def _accuracy(self, case: Case) -> None:
        """Test whether the change of accuracy on labelled samples is more than chance."""
        name = next((name for name, values in case.expected.items() if has_labels(values)), None)
        labels = self.plan.labels
        if labels is None or name is None or name not in self.first or not np.isfinite(self.first[name]).all():
            return
        found = accuracy_change(case.expected[name], self.first[name], labels[: case.batch.n])
        passed, told = found.p >= SIGNIFICANT or found.won > found.lost, found.sentence()
        self.rows.append(Row("accuracy-change", self.runner.name, case.batch.name, passed, told, n=found.n))


def run_in_chunks(runner: Runner, batch: Batch) -> dict[str, Any]:
    """Return the outputs of a batch that may be larger than the device's memory."""
    if batch.n <= _CHUNK or isinstance(runner.signature.inputs[0].shape[0], int):
        return runner.run(batch.feeds)
    parts = [
        runner.run({name: array[at : at + _CHUNK] for name, array in batch.feeds.items()})
        for at in range(0, batch.n, _CHUNK)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


#: Precisions that an engine may use without a report; a half precision needs a cast, which the file would show.
_LOOKED_FOR = ("float32", "tf32-convolutions", "tf32", "tf32-cut", "float16", "bfloat16")
#: Where emulating costs more than the verdict is worth, only these and the roundings of the precision asked for are tried.
_AT_LEAST = ("float32", "tf32")


def precision_row(run: RuntimeRun, file: str) -> Row | None:
    """Compare the error on the first batch with the error that each precision would make; ``file`` is the runtime's file.

    The row has the stage "precision". It is None where the model can't be emulated, or where the outputs can't be compared,
    which another row reports.
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
    # original network has other weights, so its reference is the original.
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
