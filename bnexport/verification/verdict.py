"""The verdict as a value: rows, what was skipped, and whether it all passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bnexport.tensors import Array
from bnexport.verification.findings import FaultResult, Findings

#: Stages without which a report is no proof, whatever its other rows say.
REQUIRED_STAGES = ("integrity", "golden", "file-proof", "strict")
#: What does as well: a file in half precision has no strict float32.
INSTEAD: dict[str, str] = {"strict": "shipping"}

#: Name and version of the JSON report: a new key needs no new version, a changed meaning does.
FORMAT = "bnexport-verification"
FORMAT_VERSION = 1


def run_name(subject: str, settings: str) -> str:
    """A runtime in one setting (``RunSettings.describe``), as the findings and reports call it."""
    return f"{subject}, {settings}" if settings else subject


@dataclass(frozen=True)
class Flips:
    """What became of the top-1 labels (see ``metrics.count_flips``).

    Attributes:
        certified: Samples whose reference margin is too large for the allowed error to change the label.
        uncertain: Samples with a smaller margin whose label stayed.
        explained: Samples with a smaller margin whose label changed.
        unexplained: Samples with a larger margin whose label changed all the same: a fault.
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
        subject: What was tested: a runtime's name, a file of the bundle, or "reference".
        case: On which inputs: "images", "noise", "zeros", "batch 7", ...
        passed: The verdict.
        reason: Why it failed, one sentence; what was compared, when it passed and there is something to say.
        n: Samples (for "weights" and "integrity": tensors or files) compared.
        error: max |candidate - reference| / max |reference|, worst output; None when it has no finite value.
        max_abs: max |candidate - reference|.
        rms: Root mean square of candidate - reference.
        bound: The largest ``error`` that passes.
        device: Where the candidate ran, as its engine says.
        flips: Top-1 labels, where an output is one score per class.
        predicted: The error of scale that the emulated precision makes on the same inputs; None without a prediction.
        detected: Precision that the error itself tells of: "float32", "tf32", ...; "" where it was not looked at.
        settings: How the engine was run, where not in strict float32 as users serve it: "tf32, IO binding".
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
        """What was tested, and how it was run where that is not in strict float32: "onnxruntime-cuda, tf32"."""
        return run_name(self.subject, self.settings)

    @property
    def ratio(self) -> float | None:
        """Error over the predicted noise: 1.3 means "1.3 x what this precision does to this model"; None without."""
        return self.error / self.predicted if self.error is not None and self.predicted else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``from_json`` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Row:
        """From ``to_json``."""
        flips = value.get("flips")
        return cls(**{**value, "flips": None if flips is None else Flips(**flips)})


@dataclass(frozen=True)
class VerificationReport:
    """Everything that ``verify`` found. It passes only when every required stage is there and every row passes.

    Attributes:
        rows: Every comparison.
        skipped: Runtime -> why it was not run. A skip is no pass: it says what this report does not cover.
        runtimes: Runtime -> what really ran: engine, version, device, providers.
        reference: What the candidates were compared with.
        inputs: Which real inputs were used, or why none.
        accuracy: Of the reference on the real images: ``{"dataset", "n", "correct"}``; empty without images.
        seed: Of the synthetic inputs.
        environment: Hardware and versions.
        findings: Predictions, drift by layer, changed labels, the self-test, what was waived.
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
    samples: Mapping[str, tuple[Array, Array]] = field(default_factory=dict, compare=False, repr=False)
    pictures: Mapping[int, Array] = field(default_factory=dict, compare=False, repr=False)

    @property
    def missing_stages(self) -> tuple[str, ...]:
        """Required stages without a single row that nothing stands in for."""
        present = {row.stage for row in self.rows} | set(self.findings.waived)
        return tuple(s for s in REQUIRED_STAGES if s not in present and INSTEAD.get(s) not in present)

    @property
    def failures(self) -> tuple[Row, ...]:
        """Rows that failed."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def missed(self) -> tuple[FaultResult, ...]:
        """Faults of the self-test that no stage caught; empty where it was not asked for."""
        return tuple(fault for fault in self.findings.self_test or () if fault.outcome == "missed")

    @property
    def passed(self) -> bool:
        """True only for a complete report without a failure, of a verifier that missed no fault put before it."""
        return bool(self.rows) and not self.missing_stages and not self.failures and not self.missed

    def with_self_test(self, faults: Sequence[FaultResult]) -> VerificationReport:
        """The same report with the outcome of the verifier's own test beside it."""
        return replace(self, findings=replace(self.findings, self_test=tuple(faults)))

    def worst(self, stage: str) -> Row | None:
        """The row of a stage with the largest error; None when the stage has no measured row."""
        measured = [row for row in self.rows if row.stage == stage and row.error is not None]
        return max(measured, key=lambda row: row.error or 0.0, default=None)

    def summary(self) -> str:
        """One line: the verdict, and what decided it."""
        if self.failures:
            first = self.failures[0]
            return f"FAIL: {len(self.failures)} of {len(self.rows)} rows failed, first {first.stage}: {first.reason}"
        if self.missing_stages:
            return f"FAIL: nothing was checked in {', '.join(self.missing_stages)}"
        if self.missed:
            fault = self.missed[0]
            return f"FAIL: the self-test missed {len(self.missed)} faults, first {fault.fault} in {fault.where}"
        waived = "".join(f"; {told}" for told in self.findings.waived.values())
        return f"PASS: {len(self.rows)} rows{waived}"

    def parity(self) -> str:
        """The verdict for the model file's own metadata: only figures that do not depend on the machine."""
        proof, strict = self.worst("file-proof"), self.worst("strict")
        if proof is None or strict is None or proof.error is None:
            return "not proven"
        return (
            f"{'PASS' if self.passed else 'FAIL'}: float64 proof of this file {proof.error:.1e} of scale"
            f" (bound {proof.bound:g}); strict float32 within {strict.bound:g} of scale of the unfolded network in float64"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values without NaN; ``from_json`` reads them back."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "passed": self.passed,
            "summary": self.summary(),
            "reference": self.reference,
            "inputs": self.inputs,
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
        """From ``to_json``; the verdict is computed again from the rows."""
        computed = ("format", "format_version", "passed", "summary", "rows", "findings")
        rest = {key: item for key, item in value.items() if key not in computed}
        rows = tuple(Row.from_json(row) for row in value["rows"])
        return cls(rows, findings=Findings.from_json(value.get("findings", {})), **rest)
