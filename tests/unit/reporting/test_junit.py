from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from bnexport.reporting.junit import junit
from bnexport.verification.findings import FaultResult, Findings
from bnexport.verification.verdict import REQUIRED_STAGES, Row, VerificationReport

GOOD = tuple(
    Row(stage, "onnxruntime-cpu", "images", passed=True, n=3, error=1e-8, bound=1e-6) for stage in REQUIRED_STAGES
)
BAD = Row(
    "strict", "onnxruntime-cuda", "noise\x00\x1b", passed=False, reason="off <by> & \x07\ud800much", settings="tf32"
)


def parsed(report: VerificationReport) -> ElementTree.Element:
    return ElementTree.fromstring(junit(report, name="models/x/1 <&>"))


def test_a_pass_has_a_case_for_each_row_and_no_failure() -> None:
    root = parsed(VerificationReport(GOOD, skipped={"torch-cuda": "no device"}, reference="r", inputs="i"))
    suite = root.find("testsuite")
    assert root.tag == "testsuites"
    assert suite is not None
    assert suite.get("name") == "models/x/1 <&>"
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "0", "1")
    cases = suite.findall("testcase")
    assert [case.get("classname") for case in cases[:-1]] == [f"{stage}.onnxruntime-cpu" for stage in REQUIRED_STAGES]
    skipped = cases[-1].find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "no device"
    properties = {item.get("name"): item.get("value") for item in suite.iter("property")}
    assert properties["verdict"] == "PASS: 4 rows"


def test_a_failure_tells_its_reason_and_hostile_text_stays_xml() -> None:
    suite = parsed(VerificationReport((*GOOD, BAD))).find("testsuite")
    assert suite is not None
    assert suite.get("failures") == "1"
    case = suite.findall("testcase")[-1]
    failure = case.find("failure")
    assert case.get("classname") == "strict.onnxruntime-cuda, tf32"
    assert case.get("name") == "noise??"
    assert failure is not None
    assert failure.get("message") == "off <by> & ??much"


@pytest.mark.parametrize("why", ["a missing stage", "a missed fault"])
def test_a_report_that_fails_without_a_failed_row_has_a_failed_case(why: str) -> None:
    report = VerificationReport(GOOD[:-1])
    if why == "a missed fault":
        missed = FaultResult("eps dropped", "model.onnx", "file-proof", (), "missed", 1e-4)
        report = replace(VerificationReport(GOOD), findings=Findings(self_test=(missed,)))
    assert not report.passed
    suite = parsed(report).find("testsuite")
    assert suite is not None
    assert suite.get("failures") == "1"
