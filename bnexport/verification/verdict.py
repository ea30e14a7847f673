"""The verdict as a value: checks, findings (predictions, drift, changed labels, self-test), skipped parts, and the result."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from html import escape
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from bnexport.plain_table import html_table, text_table
from bnexport.tensors import Array


@dataclass(frozen=True)
class NoisePrediction:
    """Effect of a precision on this model: the file evaluated with every rounding of that precision."""

    precision: str  # A key of ``onnx_files.emulation.PRECISIONS``: "float32", "tf32", "float16", "bfloat16"
    error: float  # max |emulated - reference| / scale
    rms: float  # Root mean square of emulated - reference, over scale
    n: int  # Samples
    flips: int | None = None  # Top-1 labels that this precision changes; None where no output is one score per class
    inputs: str = ""  # Kind of inputs: "images", "noise", "golden"


@dataclass(frozen=True)
class LayerDrift:
    """Distance of one layer's output on one runtime from its float64 value."""

    layer: str  # Name of the value in the file
    operator: str  # Operator that computes it: "Conv"
    error: float  # max |candidate - float64| / max |float64|
    predicted: float  # Error of the emulated precision
    left: bool  # The error is more than the prediction allows


@dataclass(frozen=True)
class FlippedSample:
    """One sample whose top-1 label is not the reference's."""

    index: int  # Index in the first batch of the verification (the test images, if any)
    label: int | None  # The true class; None without labels
    reference: int  # The reference's class
    candidate: int  # The candidate's class
    margin: float  # The reference's best score less its second best, as a share of the scale
    error: float  # max |candidate - reference| of this sample, as a share of the scale
    explained: bool  # The margin is small enough for the allowed error to change the label


@dataclass(frozen=True)
class FaultResult:
    """Outcome of one fault that the self-test put into a copy of the bundle."""

    fault: str  # Name of the fault: "eps dropped"
    where: str  # The file, layer or runtime with the fault
    expected: str  # The stage that exists to catch it
    caught: tuple[str, ...]  # Every stage that failed, in order
    outcome: str  # "caught", "missed", "harmless" (it changes no output by more than the proof's bound), "not tried"
    effect: float | None = None  # max |faulty - reference| / scale in float64; None if it can't be measured
    reason: str = ""  # The sentence of the row that caught it, or why it was not tried


@dataclass(frozen=True)
class LayerNoise:
    """Predicted noise of one int8 layer, by emulation with this layer alone in int8."""

    layer: str  # Name for --float-layers
    operator: str  # Operator that computes it: "Conv"
    own: float  # rms error of its output / rms of its output
    #: Noise power of the outputs / that with all layers in int8; None where it was not computed
    share: float | None


@dataclass(frozen=True)
class Int8Range:
    """The range of a tensor with codes: as stored, as trained, as seen."""

    tensor: str  # Name of the value in the file
    low: float  # Smallest value that the codes represent
    high: float  # Largest value that the codes represent
    source: str  # Origin: "BatchNorm", "derived from BatchNorm", "pixels", "calibration"
    trained: tuple[float, float] | None  # Range by gamma and beta: four standard deviations; None where it is unknown
    #: Smallest and largest value on the samples; None where the tensor was not evaluated
    seen: tuple[float, float] | None


@dataclass(frozen=True)
class Int8Findings:
    """The noise of an int8 file layer by layer, and its ranges."""

    layers: tuple[LayerNoise, ...]  # In the order of the graph
    ranges: tuple[Int8Range, ...]  # In the order of the graph
    n: int  # Samples
    inputs: str  # Kind of inputs: "images", "noise"
    suggested: tuple[str, ...]  # Layers with so large a share that --float-layers is worth a try


@dataclass(frozen=True)
class Findings:
    """All results of a verification except its rows."""

    predictions: tuple[NoisePrediction, ...] = ()  # One per emulated precision
    #: "runtime" or "runtime, settings" -> its layers in order of computation
    drift: Mapping[str, tuple[LayerDrift, ...]] = field(default_factory=dict)
    #: "runtime" or "runtime, settings" -> its changed labels on the first batch
    flipped: Mapping[str, tuple[FlippedSample, ...]] = field(default_factory=dict)
    #: The faults that were tried; None without a self-test
    self_test: tuple[FaultResult, ...] | None = None
    #: Required stage -> why it could not be run here and what replaces it
    waived: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # Facts that no row contains: "synthetic inputs can't show flips"
    covers: str = ""  # The part of the proof that this verification covers; "" for all of it
    int8: Int8Findings | None = None  # Layers and ranges of an int8 file; None for other files


#: Stages without which a report proves nothing.
REQUIRED_STAGES = ("integrity", "golden", "file-proof", "strict")
#: Accepted replacements: a file in half precision has no strict float32.
INSTEAD: dict[str, str] = {"strict": "shipping"}

#: Names of the batches of real inputs: a data set's test images, or the caller's samples.
REAL = ("images", "samples")
_RIGHT = re.compile(r"(\d+) of \d+ labels right before, (\d+) after")  # metrics.AccuracyChange.sentence
_HEADS = ("verdict", "check", "subject", "compared", "max error", "bound")
_NUMBERS = ("compared", "max error", "bound")

#: Name and version of the JSON report: a new key needs no new version, a changed meaning does.
FORMAT = "bnexport-verification"
FORMAT_VERSION = 1


def run_name(subject: str, settings: str) -> str:
    """Return the name of a runtime in one setting (``RunSettings.describe``), as findings and reports use it."""
    return f"{subject}, {settings}" if settings else subject


@dataclass(frozen=True)
class Flips:
    """Counts of top-1 labels (see ``metrics.count_flips``)."""

    certified: int  # Samples whose reference margin is too large for the allowed error to change the label
    uncertain: int  # Samples with a smaller margin whose label stayed
    explained: int  # Samples with a smaller margin whose label changed
    unexplained: int  # Samples with a larger margin whose label changed nevertheless: a fault
    #: 95 % upper bound of the flip rate when none of the n samples flipped, 3 / n; None when one did
    rate_bound: float | None


@dataclass(frozen=True)
class Row:
    """One comparison and its verdict."""

    stage: str  # A key of ``tolerances.TOLERANCES``, or "integrity", "declaration", "weights", "accuracy"
    subject: str  # Tested runtime, file of the bundle, or "reference"
    case: str  # Kind of inputs: "images", "noise", "zeros", "batch 7", ...
    passed: bool  # The verdict
    reason: str = ""  # Cause of the failure, one sentence. For a passed row: a note on the comparison, if any
    n: int = 0  # Samples (for "weights" and "integrity": tensors or files) compared
    #: max |candidate - reference| / max |reference|, worst output; None when it has no finite value
    error: float | None = None
    max_abs: float | None = None  # max |candidate - reference|
    rms: float | None = None  # Root mean square of candidate - reference
    bound: float | None = None  # The largest ``error`` that passes
    device: str = ""  # Device of the candidate, as its engine reports
    flips: Flips | None = None  # Top-1 labels, where an output is one score per class
    #: The error of scale that the emulated precision makes on the same inputs; None without a prediction
    predicted: float | None = None
    detected: str = ""  # Precision that the error itself shows: "float32", "tf32", ...; "" where it was not examined
    settings: str = ""  # Settings other than strict float32 as users serve it: "tf32, IO binding"

    @property
    def run(self) -> str:
        """Return the subject with its settings, if any: "onnxruntime-cuda, tf32"."""
        return run_name(self.subject, self.settings)

    @property
    def ratio(self) -> float | None:
        """Return the error over the predicted noise: 1.3 is 1.3 x this precision's effect on this model; None without."""
        return self.error / self.predicted if self.error is not None and self.predicted else None


@dataclass(frozen=True)
class VerificationReport:
    """The result of ``verify``. It passes only when every required stage is present and every row passes."""

    rows: tuple[Row, ...]  # Every comparison
    #: Runtime -> why it was not run, so that this report does not cover it
    skipped: Mapping[str, str] = field(default_factory=dict)
    #: Runtime -> engine, version, device and providers that really ran
    runtimes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reference: str = ""  # Description of the reference
    inputs: str = ""  # Description of the real inputs, or the reason why there are none
    #: Accuracy of the reference on the real images: ``{"dataset", "n", "correct"}``; empty without images
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0  # Random seed of the synthetic inputs
    environment: Mapping[str, Any] = field(default_factory=dict)  # Hardware and versions
    #: Predictions, drift by layer, changed labels, the self-test, waived stages
    findings: Findings = field(default_factory=Findings)
    coverage: str = ""  # Number of compared samples, and how many more a thorough verification compares
    #: Runtime -> error (n,) and margin (n,) of each sample, for the plots; not part of the JSON
    samples: Mapping[str, tuple[Array, Array]] = field(default_factory=dict, compare=False, repr=False)
    #: Index -> the input (channels, height, width) of each changed label; not part of the JSON
    pictures: Mapping[int, Array] = field(default_factory=dict, compare=False, repr=False)

    @property
    def missing_stages(self) -> tuple[str, ...]:
        """Return the required stages without a row or replacement."""
        present = {row.stage for row in self.rows} | set(self.findings.waived)
        return tuple(s for s in REQUIRED_STAGES if s not in present and INSTEAD.get(s) not in present)

    @property
    def failures(self) -> tuple[Row, ...]:
        """Return the rows that failed."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def missed(self) -> tuple[FaultResult, ...]:
        """Return the self-test's faults that no stage caught; empty without a self-test."""
        return tuple(fault for fault in self.findings.self_test or () if fault.outcome == "missed")

    @property
    def passed(self) -> bool:
        """Return True only for a complete report without a failure, and without a missed fault in the self-test."""
        return bool(self.rows) and not self.missing_stages and not self.failures and not self.missed

    def with_self_test(self, faults: Sequence[FaultResult]) -> VerificationReport:
        """Return the same report with the outcome of the self-test."""
        return replace(self, findings=replace(self.findings, self_test=tuple(faults)))

    def worst(self, stage: str) -> Row | None:
        """Return the row of a stage with the largest error; None when the stage has no measured row."""
        measured = [row for row in self.rows if row.stage == stage and row.error is not None]
        return max(measured, key=lambda row: row.error or 0.0, default=None)

    def summary(self, *, advice: str = "") -> str:
        """Return the verdict in one line: what was compared on which data, or the first cause of a FAIL.

        ``advice`` follows the coverage of a verdict that covers a part of the proof.
        """
        if self.failures:
            first = self.failures[0]
            failed = f"{len(self.failures)} of {len(self.rows)} comparisons failed"
            return f"FAIL: {failed}, first {first.stage}: {first.reason}"
        if self.missing_stages:
            return f"FAIL: nothing was checked in {', '.join(self.missing_stages)}"
        if self.missed:
            fault = self.missed[0]
            return f"FAIL: the self-test missed {len(self.missed)} faults, first {fault.fault} in {fault.where}"
        waived = "".join(f"; {sentence}" for sentence in self.findings.waived.values())
        covered = f", {self.findings.covers}{advice}" if self.findings.covers else ""
        compared = f"{len(self.rows)} comparison{'' if len(self.rows) == 1 else 's'}"
        return f"PASS{covered}: {compared}{self._data()}{self._labels()}{waived}"

    def _data(self) -> str:
        """Return the data of the comparisons: " on 480 images of shapes", or the number and kinds of synthetic samples."""
        sizes: dict[str, int] = {}  # of one run, or of the files where nothing was run
        for row in self.rows:
            if row.error is not None and row.stage in ("strict", "shipping", "file-proof"):
                sizes[row.case] = max(row.n, sizes.get(row.case, 0))
        if any(case in REAL for case in sizes):
            return f" on {self.inputs.removesuffix(', with labels')}"
        if synthetic := [case for case in sizes if case != "golden"]:
            return f" on {sum(sizes[case] for case in synthetic)} synthetic samples ({', '.join(synthetic)})"
        golden = max((row.n for row in self.rows if row.case == "golden"), default=0)
        return f" on {golden} golden vectors (stored inputs and outputs)" if golden else ""

    def _labels(self) -> str:
        """Return the right labels before and after: "; 480 labels right before and after"; "" without labels."""
        counts = [right for row in self.rows if row.stage == "accuracy-change" and (right := labels_right(row))]
        if not counts:
            return ""
        before, after = counts[0][0], sorted({after for _, after in counts})
        if after == [before]:
            return f"; {before} labels right before and after"
        return f"; {before} labels right before, {' to '.join(map(str, dict.fromkeys((after[0], after[-1]))))} after"

    def __str__(self) -> str:
        """Return the verdict and a table of the checks as text of about 80 columns."""
        return f"{self.summary()}\n\n{text_table(_HEADS, self._table(), numbers=_NUMBERS)}"

    def _repr_html_(self) -> str:
        """Return the verdict and a table of the checks as HTML, which notebooks show."""
        return f"<p><b>{escape(self.summary())}</b></p>{html_table(_HEADS, self._table(), numbers=_NUMBERS)}"

    def _table(self) -> list[tuple[str, ...]]:
        """Return one line per check and subject: verdict, comparisons, samples, largest error and its bound."""
        return [
            (word(group.passed), group.stage, group.subject, str(group.n), *group.worst_numbers)
            for group in groups(self)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values without NaN; ``from_json`` reads them back."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "passed": self.passed,
            "summary": self.summary(),
            "reference": self.reference,
            "inputs": self.inputs,
            "coverage": self.coverage,
            "accuracy": dict(self.accuracy),
            "seed": self.seed,
            "rows": [asdict(row) for row in self.rows],
            "skipped": dict(self.skipped),
            "runtimes": {name: dict(value) for name, value in self.runtimes.items()},
            "environment": dict(self.environment),
            "findings": json.loads(json.dumps(asdict(self.findings))),  # lists in place of tuples
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> VerificationReport:
        """Rebuild from ``to_json``; the verdict is computed again from the rows."""
        report: VerificationReport = _rebuilt(cls, value)
        return report


_hints = functools.cache(get_type_hints)


def _rebuilt(kind: Any, value: Any) -> Any:
    """Return a value of a type from its JSON: a dataclass may contain others, also in tuples and mappings."""
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)  # other keys are computed, or another version's
        return kind(**{name: _rebuilt(hints[name], item) for name, item in value.items() if name in hints})
    if origin is UnionType:  # "X | None"
        return None if value is None else _rebuilt(parts[0], value)
    if origin is tuple:
        return tuple(_rebuilt(parts[0], item) for item in value)
    if origin is Mapping:
        return {name: _rebuilt(parts[1], item) for name, item in value.items()}
    return value


#: Shown in place of a missing number.
NOTHING = "-"

#: Stages whose rows are one per file: gathered under one subject, because only a failure needs the file's name.
FILE_STAGES: dict[str, str] = {"integrity": "files"}

#: Stands for infinity in reports, which are JSON.
_INFINITE = 1e300


@dataclass(frozen=True)
class Group:
    """All comparisons of one subject in one stage."""

    stage: str
    subject: str  # Subject of the rows, with the settings if any
    rows: tuple[Row, ...]  # In the report's order; never empty

    @property
    def passed(self) -> bool:
        """Return True if every row passed."""
        return all(row.passed for row in self.rows)

    @property
    def n(self) -> int:
        """Return the number of samples (or tensors, or files) over all rows."""
        return sum(row.n for row in self.rows)

    @property
    def worst(self) -> Row | None:
        """Return the row with the largest error over bound; a failed row without a finite error comes first."""
        judged = [row for row in self.rows if row.bound is not None]
        return max(judged, key=_pressure, default=None)

    @property
    def worst_numbers(self) -> tuple[str, str]:
        """Return error and bound of the worst row, as text."""
        return (number(self.worst.error), number(self.worst.bound)) if self.worst else (NOTHING, NOTHING)

    @property
    def ratio(self) -> float | None:
        """Return the largest error over the noise predicted for the same inputs; None without a prediction."""
        return max((row.ratio for row in self.rows if row.ratio is not None), default=None)

    @property
    def flips(self) -> Flips | None:
        """Return the counts of top-1 labels over all rows; None if no row has them."""
        counted = [row.flips for row in self.rows if row.flips is not None]
        return total_flips(counted) if counted else None


def groups(report: VerificationReport) -> tuple[Group, ...]:
    """Return the report's rows by stage, subject and settings, in the order of first appearance."""
    gathered: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        gathered.setdefault((row.stage, FILE_STAGES.get(row.stage, row.run)), []).append(row)
    return tuple(Group(stage, subject, tuple(rows)) for (stage, subject), rows in gathered.items())


def labels_right(row: Row) -> tuple[int, int] | None:
    """Return the labels that the reference and the runtime get right, by a check "accuracy-change"."""
    found = _RIGHT.match(row.reason)
    return (int(found[1]), int(found[2])) if found else None


def total_flips(flips: Iterable[Flips]) -> Flips:
    """Return the sum of several counts, without a bound of the rate: the counts may share samples."""
    every = list(flips)
    counts = ("certified", "uncertain", "explained", "unexplained")
    return Flips(**{name: sum(getattr(item, name) for item in every) for name in counts}, rate_bound=None)


def number(value: float | None) -> str:
    """Return a size with two significant digits: '3.8e-07', '12', 'infinite'; NOTHING for None and NaN."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return "infinite" if abs(value) >= _INFINITE else f"{value:.2g}"


def word(passed: bool) -> str:
    """Return the verdict as a word, so that it does not depend on colours."""
    return "PASS" if passed else "FAIL"


def _pressure(row: Row) -> float:
    if row.error is None or row.bound is None:
        return math.inf if not row.passed else -1.0
    return row.error / row.bound if row.bound else (math.inf if row.error else 0.0)
