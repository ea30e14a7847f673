"""The verifier's own test: what became of the faults that it was given, for the terminal and the page."""

from __future__ import annotations

from bnexport.verification.findings import FaultResult
from bnexport.verification.verdict import VerificationReport

#: Outcome of a fault -> how a sentence counts it; in the order of the tables, what was missed first.
OUTCOMES: dict[str, str] = {
    "missed": "MISSED",
    "not tried": "not tried here",
    "harmless": "harmless to this model",
    "caught": "caught",
}


def ordered_faults(report: VerificationReport) -> list[FaultResult]:
    """Missed faults first, then what was not tried, harmless and caught; empty where the self-test was not asked for."""
    order = list(OUTCOMES)
    faults = report.findings.self_test or ()
    return sorted(faults, key=lambda fault: order.index(fault.outcome) if fault.outcome in order else len(order))


def self_test_sentence(report: VerificationReport) -> str:
    """Like "27 faults: 2 harmless to this model, 25 caught"; "" where the self-test was not asked for."""
    faults = report.findings.self_test
    if faults is None:
        return ""
    counted = [(name, sum(fault.outcome == outcome for fault in faults)) for outcome, name in OUTCOMES.items()]
    parts = ", ".join(f"{count} {name}" for name, count in counted if count)
    return f"{len(faults)} fault{'' if len(faults) == 1 else 's'}" + (f": {parts}" if parts else "")
