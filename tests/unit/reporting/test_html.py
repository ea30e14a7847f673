import dataclasses
import functools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.reports import changed, full_report, large_report, layers

from bnexport.bundle import Bundle, Manifest
from bnexport.folding.fold_report import OUTCOMES, FoldReport
from bnexport.reporting.charts import SHOWN_DRIFTS, SHOWN_MAPS
from bnexport.reporting.html import OPEN_CALLS, SHOWN_FAILURES, SHOWN_LABELS, render_report, verification_page
from bnexport.reporting.summary import RUN_STAGES, STAGES
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import REQUIRED_STAGES, Findings, VerificationReport

VOID = {"meta", "img", "br", "hr", "link", "input"}
COMMANDS = ["bnexport verify 'models/<name>/1'", "bnexport inspect models/<name>/1 && echo 'done'"]
ENVIRONMENT = {"python": "3.11.7", "cpu": "a processor", "cores": 2, "gpu": None, "packages": {"torch": "2.15.0"}}

Render = Callable[..., str]


class Page(HTMLParser):
    """Text, tags and attributes of a page; refuses tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words += f"{data} "


@pytest.fixture
def render(manifest: Manifest, fold: FoldReport) -> Render:
    return functools.partial(render_report, manifest, fold=fold, environment=ENVIRONMENT, commands=COMMANDS)


def sources(page: Page) -> list[str]:
    return [value for _, name, value in page.attributes if name in ("src", "srcset", "poster", "data", "action")]


@pytest.mark.parametrize("passed", [True, False])
def test_page_is_self_contained(render: Render, passed: bool) -> None:
    report = full_report(passed=passed)
    text = render(verification=report, samples=report.samples)
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "use", "image"} & set(page.tags)
    assert len(sources(page)) == 2, "the pictures of the two samples that have one"
    assert all(value.startswith("data:image/png;base64,") for value in sources(page))
    links = [(tag, value) for tag, name, value in page.attributes if name in ("href", "xlink:href")]
    assert links
    assert all(tag == "a" and value.startswith("#") for tag, value in links), "links inside the page alone"
    assert {value for tag, value in links} <= {f"#{value}" for _, name, value in page.attributes if name == "id"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    style = "".join(re.findall("<style>(.*?)</style>", text, re.DOTALL))
    assert style
    assert "url(" not in text
    assert "@import" not in style
    assert text.startswith("<!DOCTYPE html>")
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    assert all(value for tag, name, value in page.attributes if tag == "img" and name == "alt")


def test_verdict_comes_first(render: Render, passing: VerificationReport, failing: VerificationReport) -> None:
    good, bad = Page(render(verification=passing)), Page(render(verification=failing))
    assert good.words.split()[:8] == ["PASS:", "bn_lenet", "3", "bn_lenet,", "version", "3", "PASS", "The"]
    assert bad.words.split()[6] == "FAIL"
    assert "2 of 10 comparisons failed" in bad.words
    assert "strict, onnxruntime-cpu, ones: 12 values are not finite" in bad.words
    assert "comparisons failed" not in good.words
    assert "below 0.003 (95 %)" in " ".join(good.words.split())
    assert "(95 %)" not in bad.words


def test_an_incomplete_report_fails(render: Render) -> None:
    words = Page(render(verification=VerificationReport(()))).words
    assert words.split()[6] == "FAIL"
    assert f"Nothing was checked in: {', '.join(REQUIRED_STAGES)}" in words


def test_every_part_is_shown(render: Render, passing: VerificationReport) -> None:
    words = " ".join(Page(render(verification=passing)).words.split())
    for expected in (
        "4 of 7 BatchNorm calls folded, 1 became an affine layer, 2 were kept unchanged",
        "conv <- batch norm",
        "W' = s W, b' = s b + t",
        "(root) BatchNorm1d",
        "it follows relu",
        "would go with: gammas of one sign",
        "0.25..3.2",
        "2.3e-16",
        "3.1e-15",
        "strict (full float32 arithmetic): error nearest to its bound 3.8e-07, bound 1e-05",
        "Not run here: torch-cuda",
        "input: float32 (batch, 1, 28, 28)",
        "ONNX opset 18",
        "a processor",
        "torch 2.15.0",
        "bnexport inspect models/<name>/1 && echo 'done'",
        "bnexport verify 'models/<name>/1' --runtime onnxruntime-cpu",
        "1000 test images",
        "accuracy: correct 871",
        "CPUExecutionProvider",
    ):
        assert expected in words, expected


def test_warnings_stand_in_the_verdict_and_before_the_calls(render: Render, passing: VerificationReport) -> None:
    words = " ".join(Page(render(verification=passing)).words.split())
    first, second = (match.start() for match in re.finditer("WARNING: ", words))
    assert first < words.index("Folded BatchNorm layers") < second < words.index("(root) BatchNorm1d")


def test_many_calls_are_counted_first_and_listed_on_a_click(
    render: Render, passing: VerificationReport, large: FoldReport
) -> None:
    text = render(verification=passing, fold=large)
    words = " ".join(Page(text).words.split())
    account = text[text.index("Folded BatchNorm layers") : text.index("<h2>Every comparison")]
    assert re.findall(r"<details( open)?>", account) == [" open", ""]
    assert (
        account.index("200")
        < account.index("The 3 BatchNorm calls that remain")
        < account.index("All 250 BatchNorm calls")
    )
    assert account.index(OUTCOMES["through"]) < account.index("<details")
    assert words.count("stage0.block0.norm") == 1
    short = render(verification=passing, fold=FoldReport(large.rows[:OPEN_CALLS], 0))
    assert "<details" not in short[short.index("Folded BatchNorm layers") : short.index("<h2>Every comparison")]


def test_hostile_texts_stay_text(render: Render, failing: VerificationReport) -> None:
    for report in (failing, full_report(), full_report(passed=True)):
        text = render(verification=report, samples=report.samples)
        page = Page(text)  # which also refuses tags that a label could have closed
        assert "<script" not in text
        assert "<img src=//" not in text
        assert "<script>alert('x')</script><img src=//example.org/x.png onerror=alert(1)>" in page.words


def test_same_arguments_same_bytes(render: Render) -> None:
    report = full_report()
    assert render(verification=report, samples=report.samples) == render(verification=report, samples=report.samples)


def test_a_report_read_back_gives_the_same_page(render: Render, failing: VerificationReport) -> None:
    assert render(verification=VerificationReport.from_json(failing.to_json())) == render(verification=failing)


def test_tables_name_every_stage_and_outcome(fold: FoldReport) -> None:
    assert set(TOLERANCES) | set(REQUIRED_STAGES) <= set(STAGES)
    assert set(RUN_STAGES) <= set(STAGES)
    assert {row.outcome for row in fold.rows} == set(OUTCOMES)


def section(words: str, heading: str) -> str:
    """The text from a heading to the end of the page."""
    return words[words.index(heading) :]


def visible_text(text: str) -> str:
    return " ".join(Page(text).words.split())


def test_everything_that_was_found_is_shown(render: Render) -> None:
    report = full_report()
    words = visible_text(render(verification=report, samples=report.samples))
    for expected in (
        "onnxruntime-cuda tf32 PASS 0.00038",
        "PASS 0.00076 1.3 x predicted",
        "PASS tf32 3 of 1000",
        "shipping (the precision that is served): error nearest to its bound 0.00076, bound 0.0017;"
        " at most 1.3 x the predicted noise",
        "TF32 is predicted to move outputs by 0.00076 of scale and to change 1 of 2000 labels (images).",
        "bfloat16 is predicted to move outputs by 0.009 of scale (noise).",
        "the float64 proof was not repeated here: onnx is not installed",
        "torch-cuda torch sees no CUDA device",
        "onnxruntime-cuda, tf32: conv3 is the first above its prediction",
        "torch-cpu: all 5 layers as predicted",
        "Trouser",
        "sample 2, true class Trouser",
        "margin 0.001, error 0.0007 NOT explained by its margin onnxruntime-cuda, tf32; torchscript-cpu",
        "5 faults: 1 MISSED, 1 not tried here, 1 harmless to this model, 2 caught",
        "MISSED one flipped bit",
        "caught eps dropped model.onnx file-proof file-proof, golden above 1e-06 6.8e-05",
        "Engine and device of this run: providers",
        "871 of 1000 labels right before, 870 after",
        "bnexport verify 'models/<name>/1' --runtime onnxruntime-cuda --precision tf32 --seed 3",
    ):
        assert expected in words, expected


def test_a_missed_fault_looks_like_a_failure(render: Render) -> None:
    report = full_report(passed=True).with_self_test(full_report().findings.self_test or ())
    assert not report.failures
    text = render(verification=report)
    words = visible_text(text)
    assert words.split()[0] == "FAIL:"
    assert "The self-test missed 1 of 5 faults" in words
    assert words.index("the self-test missed: one flipped bit") < words.index("Verification")
    assert '<li class="FAIL">the self-test missed' in text
    assert "self-test" not in visible_text(render(verification=VerificationReport(report.rows)))


def test_parts_without_content_are_not_there(render: Render, passing: VerificationReport) -> None:
    words = visible_text(render(verification=passing))
    for heading in (
        "Labels that changed",
        "Layer by layer",
        "Predicted effect of each precision",
        "Self-test: would a fault be caught",
    ):
        assert heading not in words
        assert heading in visible_text(render(verification=full_report()))


def test_a_large_report_stays_small_and_states_what_is_left_out(
    render: Render, manifest: Manifest, large: FoldReport
) -> None:
    report = large_report()
    text = render_report(
        dataclasses.replace(manifest, labels=tuple(f"class {k}" for k in range(1000))),
        fold=large,
        verification=report,
        environment=ENVIRONMENT,
        commands=COMMANDS,
        samples=report.samples,
    )
    words = visible_text(text)
    assert len(text) < 1_000_000
    assert text.count('class="flip"') == 24
    assert "and 476 more samples, in the JSON report" in words
    assert text.count('<svg class="map"') == 24
    assert f"The other {24 - SHOWN_MAPS} runs" in words
    assert text.count('<svg class="drift"') == SHOWN_DRIFTS
    more = f"The layers of {24 - SHOWN_DRIFTS} more runs are in the JSON report"
    assert f"{more}; none of these runs have a layer above its prediction" in words
    assert "and 240 more layers" in words
    assert f"and {1000 - SHOWN_LABELS} more" in words
    assert "All 60 faults" in words


def test_many_failures_are_named_up_to_a_number(render: Render, failing: VerificationReport) -> None:
    rows = tuple(dataclasses.replace(failing.failures[0], case=f"case {k}") for k in range(50))
    words = visible_text(render(verification=dataclasses.replace(failing, rows=(*failing.rows, *rows))))
    assert f"and {52 - SHOWN_FAILURES} more, listed below under every comparison" in words
    assert section(words, "Every comparison").count("12 values are not finite") == 51


def test_confusions_and_drifts_beyond_their_limits_are_counted(render: Render) -> None:
    report = dataclasses.replace(
        full_report(passed=True),
        findings=Findings(
            flipped={"torch-cpu": tuple(dataclasses.replace(item, reference=k) for k, item in enumerate(changed(20)))},
            drift={f"run {k}": layers(3, 1) for k in range(SHOWN_DRIFTS + 2)},
        ),
    )
    words = visible_text(render(verification=report))
    assert "and 8 more pairs, in the JSON report" in words
    assert (
        "The layers of 2 more runs are in the JSON report; 2 of these runs have a layer above its prediction" in words
    )


def test_a_later_verification_has_the_page_of_its_bundle(tmp_path: Path, manifest: Manifest, fold: FoldReport) -> None:
    for account, expected in (
        (fold.to_json(), "4 of 7 BatchNorm calls folded"),
        ({}, "The bundle contains no fold report."),
    ):
        bundle = Bundle(tmp_path, dataclasses.replace(manifest, fold=account))
        words = visible_text(verification_page(bundle, full_report(), command="bnexport verify x"))
        assert expected in words
        assert "bnexport verify x --runtime torch-cpu --seed 3" in words
        assert "numpy 2.4.6" in words
    assert "The network has no BatchNorm." in visible_text(
        render_report(manifest, fold=FoldReport((), 0), verification=full_report(), environment={}, commands=[])
    )
