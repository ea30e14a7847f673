import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from bnexport.verification.metrics import AccuracyChange, Measurement
from bnexport.verification.stages import compare, judge
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import REQUIRED_STAGES, Flips, Row, VerificationReport

GOOD = tuple(Row(stage, "a", "b", passed=True, n=3, error=1e-8, bound=1e-6) for stage in REQUIRED_STAGES)


def test_a_complete_report_without_failure_passes() -> None:
    report = VerificationReport(GOOD)
    assert report.passed
    assert report.summary() == "PASS: 4 comparisons on 3 synthetic samples (b)"


@pytest.mark.parametrize(
    ("inputs", "cases", "after", "words"),
    [
        ("480 test images of shapes", ("images", "noise"), (480, 480), "480 labels right before and after"),
        ("480 test images of shapes", ("images",), (479, 481), "480 labels right before, 479 to 481 after"),
        ("30 images of x.npz, with labels", ("samples",), (479, 479), "480 labels right before, 479 after"),
        ("no real images: x", ("noise", "zeros"), (), "34 synthetic samples (noise, zeros)"),
        ("no real images: x", ("golden",), (), "5 golden vectors (stored inputs and outputs)"),
    ],
)
def test_a_pass_states_what_was_compared_on_which_data(
    inputs: str, cases: tuple[str, ...], after: tuple[int, ...], words: str
) -> None:
    sizes = {"images": 480, "samples": 30, "noise": 32, "zeros": 2, "golden": 5}
    rows = [Row(stage, "a", "b", passed=True, n=3) for stage in REQUIRED_STAGES]
    rows += [Row("file-proof", "model.onnx", case, True, n=2, error=1e-9, bound=1e-6) for case in cases]
    for runtime in ("torch-cpu", "onnxruntime-cpu"):
        rows += [Row("strict", runtime, case, True, n=sizes[case], error=1e-8, bound=1e-6) for case in cases]
    rows += [
        Row("accuracy-change", "torch-cpu", "images", True, accuracy(480, right).sentence(), n=500) for right in after
    ]
    report = VerificationReport(tuple(rows), inputs=inputs)
    data = f"{inputs.removesuffix(', with labels')}; " if after else ""
    assert report.summary() == f"PASS: {len(rows)} comparisons on {data}{words}"


def accuracy(before: int, after: int) -> AccuracyChange:
    return AccuracyChange(500, before, after, 1, 1, 1.0)


def test_a_report_prints_as_a_table_and_shows_as_html() -> None:
    bad = Row("strict", "x\x1b[31m<b>", "noise", passed=False, reason="<i>", n=2, error=4e-3, bound=1e-5)
    report = VerificationReport((*GOOD, bad))
    lines = str(report).splitlines()
    assert lines[0] == report.summary() == "FAIL: 1 of 5 comparisons failed, first strict: <i>"
    assert lines[2].split("  ")[0] == "verdict"
    assert lines[4].split() == ["PASS", "integrity", "files", "3", "1e-08", "1e-06"]
    assert lines[-1].split() == ["FAIL", "strict", "x?[31m<b>", "2", "0.004", "1e-05"]
    assert max(map(len, lines)) <= 80
    shown = report._repr_html_()
    assert "<b>FAIL: 1 of 5 comparisons failed, first strict: &lt;i&gt;</b>" in shown
    assert "&lt;b&gt;</td>" in shown
    assert shown.count("<tr>") == 6


def test_an_empty_report_fails() -> None:
    assert not VerificationReport(()).passed
    assert VerificationReport(()).missing_stages == REQUIRED_STAGES


@pytest.mark.parametrize("stage", REQUIRED_STAGES)
def test_a_required_stage_that_is_absent_fails(stage: str) -> None:
    report = VerificationReport(tuple(row for row in GOOD if row.stage != stage), skipped={"x": "not here"})
    assert not report.passed
    assert stage in report.summary()


@pytest.mark.parametrize("index", range(len(GOOD)))
def test_one_failed_row_fails_it_all(index: int) -> None:
    rows = list(GOOD)
    rows[index] = replace(rows[index], passed=False, reason="because")
    report = VerificationReport(tuple(rows))
    assert not report.passed
    assert report.failures == (rows[index],)
    assert "because" in report.summary()


def test_json_there_and_back() -> None:
    flips = Flips(9, 1, 0, 0, 0.3)
    report = VerificationReport(
        (*GOOD, Row("strict", "a", "c", passed=False, reason="r", flips=flips)),
        skipped={"x": "y"},
        runtimes={"a": {"engine": "e", "nodes": {"p": 3}}},
        reference="ref",
        inputs="in",
        accuracy={"dataset": "digits", "n": 5, "correct": 4},
        seed=7,
        environment={"python": "3"},
    )
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert value["passed"] is False
    assert VerificationReport.from_json(value) == report
    newer = {**value, "more": 1, "rows": [{**row, "more": 1} for row in value["rows"]]}
    assert VerificationReport.from_json(newer) == report
    value["passed"] = True  # the verdict is computed, never believed
    assert not VerificationReport.from_json(value).passed


def test_the_worst_row_of_a_stage() -> None:
    rows = (
        Row("strict", "a", "b", True, error=0.1),
        Row("strict", "a", "c", True, error=0.3),
        Row("strict", "a", "d", False),
    )
    report = VerificationReport(rows)
    assert report.worst("strict") == rows[1]
    assert report.worst("golden") is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Measurement(problem="output 'y' is missing"), "output 'y' is missing"),
        (Measurement(error=2e-5, n=1), "above 1e-05"),
        (Measurement(error=float("nan"), n=1), "above 1e-05"),
        (Measurement(error=float("inf"), n=1), "above 1e-05"),
        (Measurement(error=0.0, n=1, flips=Flips(0, 0, 0, 1, None)), "1 labels changed although"),
    ],
)
def test_judging(found: Measurement, words: str) -> None:
    passed, reason = judge("strict", found, bound=1e-5)
    assert not passed
    assert words in reason
    assert judge("strict", Measurement(error=1e-5, n=1, flips=Flips(1, 1, 1, 0, None)), bound=1e-5) == (True, "")


def test_a_row_carries_no_numbers_of_what_was_not_measured() -> None:
    row = compare("strict", "a", "b", {}, {"y": np.ones((2, 2))})
    assert (row.passed, row.error, row.flips) == (False, None, None)
    json.dumps(asdict(row), allow_nan=False)


def test_every_tolerance_has_its_reason_and_stays_below_the_smallest_fault() -> None:
    smallest_fault = 6.8e-5  # eps dropped, on a trained BN-LeNet
    for stage, tolerance in TOLERANCES.items():
        assert tolerance.bound < smallest_fault / 5, stage
        assert len(tolerance.reason) > 20
