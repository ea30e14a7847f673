import pytest
from support.reports import faults, full_report

from bnexport.reporting.tables import ordered_faults, self_test_sentence
from bnexport.verification.verdict import VerificationReport


def test_missed_faults_come_first() -> None:
    outcomes = [fault.outcome for fault in ordered_faults(full_report())]
    assert outcomes == ["missed", "not tried", "harmless", "caught", "caught"]
    assert [fault.fault for fault in ordered_faults(full_report())][-2:] == [
        "eps dropped",
        "TF32 left on in strict mode",
    ]
    assert ordered_faults(VerificationReport(())) == []


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (5, "5 faults: 1 MISSED, 1 not tried here, 1 harmless to this model, 2 caught"),
        (1, "1 fault: 1 caught"),
        (0, "0 faults"),
    ],
)
def test_a_sentence_counts_the_outcomes(count: int, sentence: str) -> None:
    report = VerificationReport(()).with_self_test(faults()[:count])
    assert self_test_sentence(report) == sentence


def test_a_self_test_that_was_not_requested_is_not_shown() -> None:
    assert self_test_sentence(VerificationReport(())) == ""
