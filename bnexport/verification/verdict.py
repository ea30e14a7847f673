"""The verdict as a value: checks, findings (predictions, drift, changed labels, self-test), skipped parts, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bnexport.tensors import Array


@dataclass(frozen=True)
class Prediction:
    """Effect of a precision on this model: the file evaluated with every rounding of that precision.

    Attributes:
        precision: A key of ``onnx_files.emulation.PRECISIONS``: "float32", "tf32", "float16", "bfloat16".
        error: max |emulated - reference| / scale.
        rms: Root mean square of emulated - reference, over scale.
        n: Samples.
        flips: Top-1 labels that this precision changes; None where no output is one score per class.
        inputs: Kind of inputs: "images", "noise", "golden".
    """

    precision: str
    error: float
    rms: float
    n: int
    flips: int | None = None
    inputs: str = ""


@dataclass(frozen=True)
class LayerDrift:
    """Distance of one layer's output on one runtime from its float64 value.

    Attributes:
        layer: Name of the value in the file.
        operator: Operator that computes it: "Conv".
        error: max |candidate - float64| / max |float64|.
        predicted: The same for the emulated precision.
        left: The error is more than the prediction allows.
    """

    layer: str
    operator: str
    error: float
    predicted: float
    left: bool


@dataclass(frozen=True)
class FlippedSample:
    """One sample whose top-1 label is not the reference's.

    Attributes:
        index: Index in the first batch of the verification (the test images, if any).
        label: The true class; None without labels.
        reference: The reference's class.
        candidate: The candidate's class.
        margin: The reference's best score less its second best, as a share of the scale.
        error: max |candidate - reference| of this sample, as a share of the scale.
        explained: The margin is small enough for the allowed error to change the label.
    """

    index: int
    label: int | None
    reference: int
    candidate: int
    margin: float
    error: float
    explained: bool


@dataclass(frozen=True)
class FaultResult:
    """Outcome of one fault that the self-test put into a copy of the bundle.

    Attributes:
        fault: Name of the fault: "eps dropped".
        where: The file, layer or runtime with the fault.
        expected: The stage that exists to catch it.
        caught: Every stage that failed, in order.
        outcome: "caught", "missed", "harmless" (it changes no output by more than the proof's bound), "not tried".
        effect: max |faulty - reference| / scale in float64; None where it has no such number.
        reason: The sentence of the row that caught it, or why it was not tried.
    """

    fault: str
    where: str
    expected: str
    caught: tuple[str, ...]
    outcome: str
    effect: float | None = None
    reason: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FaultResult:
        """Rebuild from ``dataclasses.asdict`` after JSON."""
        return cls(**{**value, "caught": tuple(value["caught"])})


@dataclass(frozen=True)
class Findings:
    """All results of a verification except its rows.

    Attributes:
        predictions: One per emulated precision.
        drift: "runtime" or "runtime, settings" -> its layers in order of computation.
        flipped: "runtime" or "runtime, settings" -> its changed labels on the first batch.
        self_test: The faults that were tried; None when the self-test was not asked for.
        waived: Required stage -> why it could not be run here and what replaces it.
        warnings: Facts that no row contains: "synthetic inputs can't show flips".
        covers: The part of the proof that this verification covers; "" for all of it.
    """

    predictions: tuple[Prediction, ...] = ()
    drift: Mapping[str, tuple[LayerDrift, ...]] = field(default_factory=dict)
    flipped: Mapping[str, tuple[FlippedSample, ...]] = field(default_factory=dict)
    self_test: tuple[FaultResult, ...] | None = None
    waived: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    covers: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_json`` reads them back."""
        return {
            "predictions": [asdict(item) for item in self.predictions],
            "drift": {name: [asdict(item) for item in items] for name, items in self.drift.items()},
            "flipped": {name: [asdict(item) for item in items] for name, items in self.flipped.items()},
            "self_test": None if self.self_test is None else [_listed(asdict(item)) for item in self.self_test],
            "waived": dict(self.waived),
            "warnings": list(self.warnings),
            "covers": self.covers,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Findings:
        """Rebuild from ``to_json``."""
        tests = value.get("self_test")
        return cls(
            tuple(Prediction(**item) for item in value.get("predictions", ())),
            {name: tuple(LayerDrift(**item) for item in items) for name, items in value.get("drift", {}).items()},
            {name: tuple(FlippedSample(**item) for item in items) for name, items in value.get("flipped", {}).items()},
            None if tests is None else tuple(map(FaultResult.from_json, tests)),
            dict(value.get("waived", {})),
            tuple(value.get("warnings", ())),
            str(value.get("covers", "")),
        )


def _listed(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "caught": list(value["caught"])}


#: Stages without which a report is no proof, whatever its other rows say.
REQUIRED_STAGES = ("integrity", "golden", "file-proof", "strict")
#: Accepted replacements: a file in half precision has no strict float32.
INSTEAD: dict[str, str] = {"strict": "shipping"}

#: Name and version of the JSON report: a new key needs no new version, a changed meaning does.
FORMAT = "bnexport-verification"
FORMAT_VERSION = 1


def run_name(subject: str, settings: str) -> str:
    """Return the name of a runtime in one setting (``RunSettings.describe``), as findings and reports use it."""
    return f"{subject}, {settings}" if settings else subject


@dataclass(frozen=True)
class Flips:
    """Counts of top-1 labels (see ``metrics.count_flips``).

    Attributes:
        certified: Samples whose reference margin is too large for the allowed error to change the label.
        uncertain: Samples with a smaller margin whose label stayed.
        explained: Samples with a smaller margin whose label changed.
        unexplained: Samples with a larger margin whose label changed nevertheless: a fault.
        rate_bound: 95 % upper bound of the flip rate when none of the n samples flipped, 3 / n; None when one did.
    """

    certified: int
    uncertain: int
    explained: int
    unexplained: int
    rate_bound: float | None


@dataclass(frozen=True)
class Row:
    """One comparison and its verdict.

    Attributes:
        stage: A key of ``tolerances.TOLERANCES``, or "integrity", "declaration", "weights", "accuracy".
        subject: Tested runtime, file of the bundle, or "reference".
        case: Kind of inputs: "images", "noise", "zeros", "batch 7", ...
        passed: The verdict.
        reason: Why it failed, one sentence. For a passed row: a note on the comparison, if any.
        n: Samples (for "weights" and "integrity": tensors or files) compared.
        error: max |candidate - reference| / max |reference|, worst output; None when it has no finite value.
        max_abs: max |candidate - reference|.
        rms: Root mean square of candidate - reference.
        bound: The largest ``error`` that passes.
        device: Device of the candidate, as its engine reports.
        flips: Top-1 labels, where an output is one score per class.
        predicted: The error of scale that the emulated precision makes on the same inputs; None without a prediction.
        detected: Precision that the error itself shows: "float32", "tf32", ...; "" where it was not examined.
        settings: Settings other than strict float32 as users serve it: "tf32, IO binding".
    """

    stage: str
    subject: str
    case: str
    passed: bool
    reason: str = ""
    n: int = 0
    error: float | None = None
    max_abs: float | None = None
    rms: float | None = None
    bound: float | None = None
    device: str = ""
    flips: Flips | None = None
    predicted: float | None = None
    detected: str = ""
    settings: str = ""

    @property
    def run(self) -> str:
        """Return the subject with its settings, if any: "onnxruntime-cuda, tf32"."""
        return run_name(self.subject, self.settings)

    @property
    def ratio(self) -> float | None:
        """Return the error over the predicted noise: 1.3 means "1.3 x what this precision does to this model"; None without."""
        return self.error / self.predicted if self.error is not None and self.predicted else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_json`` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Row:
        """Rebuild from ``to_json``."""
        flips = value.get("flips")
        return cls(**{**value, "flips": None if flips is None else Flips(**flips)})


@dataclass(frozen=True)
class VerificationReport:
    """The result of ``verify``. It passes only when every required stage is present and every row passes.

    Attributes:
        rows: Every comparison.
        skipped: Runtime -> why it was not run, so that this report does not cover it.
        runtimes: Runtime -> engine, version, device and providers that really ran.
        reference: Description of the reference.
        inputs: Description of the real inputs, or the reason why there are none.
        accuracy: Accuracy of the reference on the real images: ``{"dataset", "n", "correct"}``; empty without images.
        seed: Random seed of the synthetic inputs.
        environment: Hardware and versions.
        findings: Predictions, drift by layer, changed labels, the self-test, waived stages.
        coverage: How many samples were compared, and how many more a thorough verification compares.
        samples: Runtime -> error (n,) and margin (n,) of each sample, for the plots; not part of the JSON.
        pictures: Index -> the input (channels, height, width) of each changed label; not part of the JSON.
    """

    rows: tuple[Row, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    runtimes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reference: str = ""
    inputs: str = ""
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    environment: Mapping[str, Any] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    coverage: str = ""
    samples: Mapping[str, tuple[Array, Array]] = field(default_factory=dict, compare=False, repr=False)
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
        """Return the verdict and its cause in one line; ``advice`` follows the coverage of a verdict that covers a part."""
        if self.failures:
            first = self.failures[0]
            return f"FAIL: {len(self.failures)} of {len(self.rows)} rows failed, first {first.stage}: {first.reason}"
        if self.missing_stages:
            return f"FAIL: nothing was checked in {', '.join(self.missing_stages)}"
        if self.missed:
            fault = self.missed[0]
            return f"FAIL: the self-test missed {len(self.missed)} faults, first {fault.fault} in {fault.where}"
        waived = "".join(f"; {told}" for told in self.findings.waived.values())
        covered = f", {self.findings.covers}{advice}" if self.findings.covers else ""
        return f"PASS{covered}: {len(self.rows)} rows{waived}"

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
            "rows": [row.to_json() for row in self.rows],
            "skipped": dict(self.skipped),
            "runtimes": {name: dict(value) for name, value in self.runtimes.items()},
            "environment": dict(self.environment),
            "findings": self.findings.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> VerificationReport:
        """Rebuild from ``to_json``; the verdict is computed again from the rows."""
        computed = ("format", "format_version", "passed", "summary", "rows", "findings")
        rest = {key: item for key, item in value.items() if key not in computed}
        rows = tuple(Row.from_json(row) for row in value["rows"])
        return cls(rows, findings=Findings.from_json(value.get("findings", {})), **rest)
