"""The verdict as JUnit XML, the form in which CI systems show test results."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

from bnexport.environment import describe
from bnexport.reporting.summary import number, run_name
from bnexport.verification.verdict import Row, VerificationReport


def junit(report: VerificationReport, *, name: str) -> bytes:
    """One test suite: a test case per comparison, a failure with its reason, a skipped case per runtime that did not run.

    A report that fails without a failed row (a stage is missing, the self-test missed a fault) has a failed case of its own,
    so that no CI system takes it for a pass.

    Args:
        report: The verdict.
        name: Of the suite: the bundle's path as the user gave it.
    """
    cases = [*(_case(row) for row in report.rows), *_skipped(report)]
    if not report.passed and not report.failures:
        cases.append(_failed("verdict", "verdict", report.summary()))
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": "0",
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
    }
    suites = ElementTree.Element("testsuites", {"name": "bnexport verify", **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _clean(name), **counts})
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in _properties(report):
        ElementTree.SubElement(properties, "property", {"name": key, "value": _clean(value)})
    suite.extend(cases)
    ElementTree.indent(suites)
    content: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _properties(report: VerificationReport) -> Iterator[tuple[str, str]]:
    yield "verdict", report.summary()
    yield "reference", report.reference
    yield "inputs", report.inputs
    if report.environment:
        yield "environment", describe(dict(report.environment))


def _case(row: Row) -> ElementTree.Element:
    if not row.passed:
        return _failed(f"{row.stage}.{run_name(row)}", row.case, row.reason or "over its bound")
    case = _named(f"{row.stage}.{run_name(row)}", row.case)
    if row.error is not None:
        told = f"error {number(row.error)} of scale, bound {number(row.bound)}, n = {row.n}"
        ElementTree.SubElement(case, "system-out").text = told
    return case


def _skipped(report: VerificationReport) -> Iterator[ElementTree.Element]:
    for name, why in report.skipped.items():
        case = _named("runtime", name)
        ElementTree.SubElement(case, "skipped", {"message": _clean(why)})
        yield case


def _failed(group: str, name: str, reason: str) -> ElementTree.Element:
    case = _named(group, name)
    failure = ElementTree.SubElement(case, "failure", {"message": _clean(reason), "type": "FAIL"})
    failure.text = _clean(reason)
    return case


def _named(group: str, name: str) -> ElementTree.Element:
    # Times are no part of a verdict; "0" keeps readers that insist on the attribute.
    return ElementTree.Element("testcase", {"classname": _clean(group), "name": _clean(name), "time": "0"})


def _clean(text: str) -> str:
    """Without what XML 1.0 can't hold: control characters, half characters and two non-characters (section 2.2)."""
    return "".join(char if _allowed(ord(char)) else "?" for char in text)


def _allowed(code: int) -> bool:
    if code < 0x20:
        return code in (0x9, 0xA, 0xD)
    return not 0xD800 <= code <= 0xDFFF and code not in (0xFFFE, 0xFFFF)
