"""What a verification finds beside its rows: predictions, drift by layer, changed labels, the verifier's own test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """What a precision does to this very model, by emulation: the file evaluated with every rounding of that precision.

    Attributes:
        precision: A key of ``runtimes.emulation.PRECISIONS``: "float32", "tf32", "float16", "bfloat16".
        error: max |emulated - reference| / scale.
        rms: Root mean square of emulated - reference, over scale.
        n: Samples.
        flips: Top-1 labels that this precision changes; None where no output is one score per class.
        inputs: On which inputs: "images", "noise", "golden".
    """

    precision: str
    error: float
    rms: float
    n: int
    flips: int | None = None
    inputs: str = ""


@dataclass(frozen=True)
class LayerDrift:
    """How far one layer's output is from its float64 value on one runtime.

    Attributes:
        layer: Name of the value in the file.
        operator: What computes it: "Conv".
        error: max |candidate - float64| / max |float64|.
        predicted: The same for the emulated precision.
        left: Whether the error is more than the prediction allows.
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
        index: In the first batch of the verification (the test images where there are some).
        label: The true class; None without labels.
        reference: The reference's class.
        candidate: The candidate's class.
        margin: The reference's best score less its second best, as a share of the scale.
        error: max |candidate - reference| of this sample, as a share of the scale.
        explained: Whether the margin is small enough for the allowed error to change the label.
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
    """What became of one fault that the self-test put into a copy of the bundle.

    Attributes:
        fault: What was done: "eps dropped".
        where: To which file, layer or runtime.
        expected: The stage that exists to catch it.
        caught: Every stage that failed, in order; empty when none did.
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
        """From ``dataclasses.asdict`` after JSON."""
        return cls(**{**value, "caught": tuple(value["caught"])})


@dataclass(frozen=True)
class Findings:
    """Everything of a verification that is not a row.

    Attributes:
        predictions: One per emulated precision.
        drift: "runtime" or "runtime, settings" -> its layers in order of computation.
        flipped: "runtime" or "runtime, settings" -> its changed labels on the first batch.
        self_test: The faults that were tried; None when the self-test was not asked for.
        waived: Required stage -> why it could not be run here and what stands in for it.
        warnings: What a reader must know and no row says: "synthetic inputs can't show flips".
    """

    predictions: tuple[Prediction, ...] = ()
    drift: Mapping[str, tuple[LayerDrift, ...]] = field(default_factory=dict)
    flipped: Mapping[str, tuple[FlippedSample, ...]] = field(default_factory=dict)
    self_test: tuple[FaultResult, ...] | None = None
    waived: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``from_json`` reads them back."""
        return {
            "predictions": [asdict(item) for item in self.predictions],
            "drift": {name: [asdict(item) for item in items] for name, items in self.drift.items()},
            "flipped": {name: [asdict(item) for item in items] for name, items in self.flipped.items()},
            "self_test": None if self.self_test is None else [_listed(asdict(item)) for item in self.self_test],
            "waived": dict(self.waived),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Findings:
        """From ``to_json``."""
        tests = value.get("self_test")
        return cls(
            tuple(Prediction(**item) for item in value.get("predictions", ())),
            {name: tuple(LayerDrift(**item) for item in items) for name, items in value.get("drift", {}).items()},
            {name: tuple(FlippedSample(**item) for item in items) for name, items in value.get("flipped", {}).items()},
            None if tests is None else tuple(map(FaultResult.from_json, tests)),
            dict(value.get("waived", {})),
            tuple(value.get("warnings", ())),
        )


def _listed(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "caught": list(value["caught"])}
