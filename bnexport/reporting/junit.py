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
    cases = [*(_case(row) for row in report.rows), *map(_fault, report.findings.self_test or ()), *_skipped(report)]
    if not report.passed and all(case.find("failure") is None for case in cases):
        cases.append(_failed("verdict", "verdict", report.summary(), kind="verdict"))
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


def _case(row: Row) -> ElementTree.Element:
    if not row.passed:
        return _failed(f"{row.stage}.{row.run}", row.case, row.reason or "over its bound", kind=row.stage)
    case = _named(f"{row.stage}.{row.run}", row.case)
    notes = [row.reason] if row.reason else []
    if row.error is not None:
        notes.append(f"error {number(row.error)} of scale, bound {number(row.bound)}, n = {row.n}")
    if row.ratio is not None:
        notes.append(f"{number(row.ratio)} x predicted")
    return _with_output(case, "; ".join(notes))


def _fault(fault: FaultResult) -> ElementTree.Element:
    """Return the test case of a fault; a missed fault is a failure of the verifier."""
    where = f"{fault.fault} in {fault.where}"
    if fault.outcome == "missed":
        reason = f"no stage caught it; {fault.expected} exists to" + (f": {fault.reason}" if fault.reason else "")
        return _failed("self-test", where, reason, kind="self-test")
    if fault.outcome == "not tried":
        return _left_out("self-test", where, fault.reason or "not tried")
    outcome = f"caught by {', '.join(fault.caught)}" if fault.caught else fault.outcome
    return _with_output(_named("self-test", where), f"{outcome}: {fault.reason}" if fault.reason else outcome)


def _skipped(report: VerificationReport) -> Iterator[ElementTree.Element]:
    for name, why in report.skipped.items():
        yield _left_out("runtime", name, why)
    for stage, why in report.findings.waived.items():
        yield _left_out(stage, "not run here", why)


def _left_out(group: str, name: str, why: str) -> ElementTree.Element:
    case = _named(group, name)
    ElementTree.SubElement(case, "skipped", {"message": _clean(why)})
    return case


def _failed(group: str, name: str, reason: str, *, kind: str) -> ElementTree.Element:
    case = _named(group, name)
    failure = ElementTree.SubElement(case, "failure", {"message": _clean(reason), "type": _clean(kind)})
    failure.text = _clean(reason)
    return case


def _named(group: str, name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", {"classname": _clean(group), "name": _clean(name), "time": _TIME})


def _with_output(case: ElementTree.Element, text: str) -> ElementTree.Element:
    if text:
        ElementTree.SubElement(case, "system-out").text = _clean(text)
    return case


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
