"""Write the verdict as JUnit XML, which CI systems show as test results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from xml.etree import ElementTree

from bnexport.environment import describe
from bnexport.verification.verdict import FaultResult, Row, VerificationReport, number

#: A verdict has no times; some readers require the attribute.
_TIME = "0"
#: Characters that XML 1.0 forbids: control characters, surrogates and two non-characters (section 2.2).
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: VerificationReport, *, name: str) -> bytes:
    """Return one test suite ``name``: a test case per comparison and per fault of the self-test; failures have their reason.

    A part that did not run is a skipped case. If a report fails without a failed case (a stage is missing), a failed case
    is added, so that CI systems do not count the report as passed.
    """
    cases = [*map(_row, report.rows), *map(_fault, report.findings.self_test or ())]
    cases += [_case("runtime", name, "skipped", why) for name, why in report.skipped.items()]
    cases += [_case(stage, "not run here", "skipped", why) for stage, why in report.findings.waived.items()]
    if not report.passed and all(case.find("failure") is None for case in cases):
        cases.append(_case("verdict", "verdict", "failure", report.summary()))
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": "0",
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
        "time": _TIME,
    }
    suites = ElementTree.Element("testsuites", {"name": "bnexport verify", **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _clean(name), **counts})
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in _properties(report):
        ElementTree.SubElement(properties, "property", {"name": _clean(key), "value": _clean(value)})
    suite.extend(cases)
    ElementTree.indent(suites)
    content: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _properties(report: VerificationReport) -> Iterator[tuple[str, str]]:
    yield "verdict", report.summary()
    yield "reference", report.reference
    yield "inputs", report.inputs
    yield "coverage", report.coverage
    yield "seed", str(report.seed)
    if report.environment:
        yield "environment", describe(dict(report.environment))
    for run, what in report.runtimes.items():
        yield f"runtime: {run}", json.dumps(dict(what), ensure_ascii=False, default=str)
    for at, warning in enumerate(report.findings.warnings, 1):
        yield f"warning {at}", warning


def _row(row: Row) -> ElementTree.Element:
    """Return the test case of a comparison."""
    group = f"{row.stage}.{row.run}"
    if not row.passed:
        return _case(group, row.case, "failure", row.reason or "over its bound")
    notes = [row.reason] if row.reason else []
    if row.error is not None:
        notes.append(f"error {number(row.error)} of scale, bound {number(row.bound)}, n = {row.n}")
    if row.ratio is not None:
        notes.append(f"{number(row.ratio)} x predicted")
    return _case(group, row.case, "system-out", "; ".join(notes))


def _fault(fault: FaultResult) -> ElementTree.Element:
    """Return the test case of a fault; a missed fault is a failure of the verifier."""
    where = f"{fault.fault} in {fault.where}"
    if fault.outcome == "missed":
        reason = f"no stage caught it; {fault.expected} exists to" + (f": {fault.reason}" if fault.reason else "")
        return _case("self-test", where, "failure", reason)
    if fault.outcome == "not tried":
        return _case("self-test", where, "skipped", fault.reason or "not tried")
    outcome = f"caught by {', '.join(fault.caught)}" if fault.caught else fault.outcome
    return _case("self-test", where, "system-out", f"{outcome}: {fault.reason}" if fault.reason else outcome)


def _case(group: str, name: str, outcome: str, text: str) -> ElementTree.Element:
    """Return a test case with a text about its outcome: "failure", "skipped" or "system-out", which may be empty.

    The type of a failure is the beginning of ``group``: the stage.
    """
    case = ElementTree.Element("testcase", {"classname": _clean(group), "name": _clean(name), "time": _TIME})
    if outcome == "skipped":
        ElementTree.SubElement(case, outcome, {"message": _clean(text)})
    elif outcome == "failure":
        kind = {"message": _clean(text), "type": _clean(group.partition(".")[0])}
        ElementTree.SubElement(case, outcome, kind).text = _clean(text)
    elif text:
        ElementTree.SubElement(case, outcome).text = _clean(text)
    return case


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
