from collections import Counter
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from support.reports import full_report, large_report

from bnexport.reporting.junit import junit
from bnexport.verification.verdict import REQUIRED_STAGES, FaultResult, Findings, Row, VerificationReport

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
    assert properties["verdict"].startswith("PASS: 4 comparisons")


def test_a_failure_states_its_reason_and_hostile_text_stays_xml() -> None:
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


#: Element -> (children in their order, required attributes, other attributes), as in the schema that Jenkins, GitLab and
#: pytest share (junit-10.xsd).
GRAMMAR: dict[str, tuple[tuple[str, ...], set[str], set[str]]] = {
    "testsuites": (("testsuite",), set(), {"name", "time", "tests", "failures", "errors", "skipped"}),
    "testsuite": (
        ("properties", "testcase", "system-out", "system-err"),
        {"name", "tests"},
        {"failures", "errors", "skipped", "time", "timestamp", "hostname", "id", "package"},
    ),
    "properties": (("property",), set(), set()),
    "property": ((), {"name", "value"}, set()),
    "testcase": (
        ("skipped", "error", "failure", "system-out", "system-err"),
        {"name", "classname"},
        {"time", "file", "line"},
    ),
    "failure": ((), set(), {"message", "type"}),
    "skipped": ((), set(), {"message", "type"}),
    "system-out": ((), set(), set()),
}


def check(element: ElementTree.Element) -> None:
    """Refuse what the schema does not allow."""
    children, required, optional = GRAMMAR[element.tag]
    assert required <= set(element.keys()) <= required | optional, element.tag
    order = [children.index(child.tag) for child in element]
    assert order == sorted(order), f"children of {element.tag} in another order"
    for key in {"tests", "failures", "errors", "skipped"} & set(element.keys()):
        assert int(element.get(key, "")) >= 0
    if "time" in element.keys():  # noqa: SIM118 -- an element is not a mapping
        assert float(element.get("time", "")) >= 0
    for child in element:
        check(child)


@pytest.mark.parametrize(
    "report",
    [full_report(), full_report(passed=True), large_report(), VerificationReport(()), VerificationReport((*GOOD, BAD))],
    ids=["fail", "pass", "large", "empty", "hostile"],
)
def test_every_report_is_junit(report: VerificationReport) -> None:
    root = parsed(report)
    check(root)
    (suite,) = root
    cases = suite.findall("testcase")
    assert suite.get("tests") == root.get("tests") == str(len(cases))
    assert suite.get("failures") == str(sum(len(case.findall("failure")) for case in cases))
    assert suite.get("skipped") == str(sum(len(case.findall("skipped")) for case in cases))
    assert (suite.get("failures") == "0") is report.passed
    assert all(len(case.findall("failure")) + len(case.findall("skipped")) <= 1 for case in cases)
    named = Counter((case.get("classname"), case.get("name")) for case in cases)
    assert max(named.values()) == 1, "CI systems distinguish cases by their names"


def test_everything_that_was_found_is_a_case() -> None:
    report = full_report()
    (suite,) = parsed(report)
    found = {(case.get("classname"), case.get("name")): case for case in suite.findall("testcase")}
    served = found["shipping.onnxruntime-cuda, tf32", "images"]
    assert served.findtext("system-out") == "error 0.00076 of scale, bound 0.0017, n = 1000; 1.3 x predicted"
    assert found["self-test", "eps dropped in model.onnx"].findtext("system-out") == (
        "caught by file-proof, golden: above 1e-06"
    )
    missed = [case for (group, _), case in found.items() if group == "self-test" and case.find("failure") is not None]
    assert [case.find("failure").get("type") for case in missed] == ["self-test"]
    assert found["self-test", "wrong preprocessing in manifest.json"].find("skipped") is not None
    assert found["runtime", "torch-cuda"].find("skipped").get("message") == "torch sees no CUDA device"
    assert found["file-proof", "not run here"].find("skipped") is not None
    assert found["strict.torchscript-cpu", "images"].find("failure").get("type") == "strict"
    properties = {item.get("name"): item.get("value") for item in suite.iter("property")}
    assert properties["seed"] == "3"
    assert "CUDAExecutionProvider" in properties["runtime: onnxruntime-cuda, tf32"]
    assert "a processor" in properties["environment"]
    assert properties["warning 1"].endswith("synthetic inputs can't show flips")
