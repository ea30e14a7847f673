"""report.html in a browser: no requests, no errors, nothing outside of the screen, everything readable."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Browser
from support.reports import HOSTILE, full_report, large_report

from bnexport.bundle import Manifest
from bnexport.folding.fold_report import FoldReport, FoldRow
from bnexport.reporting.html import render_report
from bnexport.tensors import Signature, TensorSpec
from bnexport.verification.verdict import VerificationReport

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium")]

REPORTS: dict[str, VerificationReport] = {
    "fail": full_report(),
    "pass": full_report(passed=True),
    "large": large_report(),
    "empty": VerificationReport(()),
}
#: Elements that reach beyond the right edge, as "tag.class: how far".
BEYOND = """[...document.querySelectorAll('body *')]
  .filter(e => e.checkVisibility() && e.getBoundingClientRect().width > 1)
  .map(e => [e, e.getBoundingClientRect().right - document.documentElement.clientWidth])
  .filter(([e, over]) => over > 1 && !e.closest('svg, thead'))
  .map(([e, over]) => `${e.tagName}.${e.className}: ${over}`)"""
#: Texts whose contrast with what lies behind them is below 4.5 : 1 (WCAG 2.2, 1.4.3).
FAINT = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] === 255) return c; } return [255, 255, 255, 255]; };
  return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() &&
      [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).flatMap(e => {
    const style = getComputedStyle(e), text = e instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(rgb(text)), light(behind(e))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    return ratio < 4.5 ? [`${e.tagName}.${e.className}: ${ratio.toFixed(2)}`] : []; });
})()"""


def write_page(folder: Path, name: str) -> str:
    """Address of a page with a report."""
    signature = Signature(
        (TensorSpec("input", "float32", ("batch", 1, 28, 28)),), (TensorSpec("logits", "float32", ("batch", 10)),)
    )
    labels = tuple(f"class {index}" for index in range(9))
    manifest = Manifest("bn_lenet", 3, signature, {"source": "bn_lenet"}, labels=(*labels, HOSTILE), onnx={"opset": 18})
    row = FoldRow(
        "bn1", "BatchNorm2d", "backward", "conv <- batch norm", "conv1", "W' = s W", channels=6, gain=(0.1, 4.0)
    )
    kept = FoldRow(HOSTILE, "BatchNorm2d", "kept", reason=HOSTILE, hint="gammas of one sign", channels=6)
    fold = FoldReport((kept, *[row] * (250 if name == "large" else 3)), 1, 1e-15, warnings=(HOSTILE,))
    report = REPORTS[name]
    text = render_report(
        manifest,
        fold=fold,
        verification=report,
        environment=report.environment,
        commands=["bnexport verify models/bn_lenet/3"],
        samples=report.samples or None,
    )
    file = folder / f"{name}.html"
    file.write_text(text, encoding="utf-8")
    return file.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module", params=list(REPORTS))
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return request.param, write_page(tmp_path_factory.mktemp("page"), request.param)


def test_the_page_makes_no_request_and_logs_no_error(browser: Browser, page: tuple[str, str]) -> None:
    _, address = page
    browser.screen(1100)
    browser.open(address)
    assert browser.requests[0] == address
    assert all(request.startswith("data:image/png;base64,") for request in browser.requests[1:])
    assert browser.complaints == []
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert browser.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("width", [320, 390, 800, 1056, 1057, 1100, 1920])
def test_the_page_fits_the_screen(browser: Browser, page: tuple[str, str], width: int) -> None:
    _, address = page
    browser.screen(width)
    browser.open(address)
    assert browser.evaluate("document.documentElement.clientWidth") == width
    browser.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.evaluate(BEYOND) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


#: Labels of axes that wrap, that lie on one another, or that hang over the end of their axis.
LABELS = """(() => {
  const found = [];
  for (const axis of document.querySelectorAll('.ticks, svg.map, svg.drift')) {
    const all = [...axis.querySelectorAll('span, text')].map(label => [label.textContent, label.getBoundingClientRect()]);
    for (const [at, [text, box]] of all.entries()) {
      if (box.height > 28) found.push('wraps: ' + text);
      if (axis.matches('.ticks') && box.right > axis.getBoundingClientRect().right + 2) found.push('hangs over: ' + text);
      for (const [other, that] of all.slice(at + 1))
        if (box.left < that.right && that.left < box.right && box.top + 1 < that.bottom && that.top + 1 < box.bottom)
          found.push(text + ' on ' + other);
    }
  }
  return found;
})()"""
#: Number of columns without a head.
UNNAMED = "[...document.querySelectorAll('th')].filter(head => !head.innerText.trim()).length"


@pytest.mark.parametrize("width", [390, 1100])
def test_labels_of_axes_can_be_read_and_every_column_has_a_head(
    browser: Browser, page: tuple[str, str], width: int
) -> None:
    name, address = page
    browser.screen(width)
    browser.open(address)
    browser.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.evaluate(LABELS) == []
    assert browser.evaluate(UNNAMED) == 0
    if name == "pass":
        kinds = "[...document.querySelectorAll('.folds td .nowrap')].map(part => part.getClientRects().length)"
        assert set(browser.evaluate(kinds)) == {1}, "the kind of a BatchNorm is not broken"
        risk = "[...document.querySelectorAll('svg.map')].every(map => map.querySelector('.risk').getBBox().y < 150"
        assert browser.evaluate(f"{risk} && map.querySelector('.risk').getBBox().width > 20)")


@pytest.mark.parametrize("dark", [False, True])
def test_everything_can_be_read_by_day_and_in_the_dark(browser: Browser, page: tuple[str, str], dark: bool) -> None:
    _, address = page
    browser.screen(1100, dark=dark)
    browser.open(address)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    browser.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.evaluate(FAINT) == []


def test_the_findings_are_on_the_page(browser: Browser, page: tuple[str, str]) -> None:
    name, address = page
    browser.screen(1100)
    browser.open(address)
    text = browser.evaluate("document.body.innerText")
    verdict = "PASS" if REPORTS[name].passed else "FAIL"
    assert text.split()[3] == verdict
    assert browser.evaluate("document.title").startswith(f"{verdict}: ")
    assert "<script>alert('x')</script>" in text, "hostile words are words"
    if name in ("fail", "pass"):
        for expected in (
            "1.3 x predicted",
            "TF32 is predicted to move outputs by 0.00076 of scale and to change 1 of 2000 labels",
            "Labels that changed",
            "class 1 → class 4",
            "Layer by layer",
            "Self-test: would a fault be caught?",
            "bnexport verify models/bn_lenet/3 --runtime onnxruntime-cuda --precision tf32",
        ):
            assert expected in text, expected
    if name == "fail":
        assert "conv3 is the first above its prediction" in text
        assert "NOT explained by its margin" in text


def test_a_line_of_the_table_leads_to_its_comparisons(browser: Browser, tmp_path: Path) -> None:
    address = write_page(tmp_path, "pass")
    browser.screen(1100)
    browser.open(address)
    state = "document.getElementById('run-2').closest('details').open"
    assert browser.evaluate(state) is False
    assert browser.evaluate("document.querySelector('.matrix a[href=\"#run-2\"]').click()") is None
    assert browser.evaluate(f"new Promise(done => setTimeout(() => done({state}), 50))") is True


def test_paper_shows_tables_and_everything_that_is_folded_away(browser: Browser, page: tuple[str, str]) -> None:
    name, address = page
    browser.screen(718, media="print")  # A4 less its margins
    browser.open(address)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 718
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate(FAINT) == []
    hidden = "[...document.querySelectorAll('details > :not(summary)')].filter(e => !e.checkVisibility())"
    assert browser.evaluate(f"{hidden}.length") == 0
    browser.screen(1100)
    assert (browser.evaluate(f"{hidden}.length") > 0) is (name != "empty")
    if name != "empty":
        assert browser.evaluate("getComputedStyle(document.querySelector('.matrix tr')).display") == "table-row"


def test_the_checks_see_what_they_look_for(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text(
        "<!DOCTYPE html><title>x</title><body><p style='color:#aaa'>faint</p><div style='width:3000px'>wide</div>"
        "<img src='https://example.org/x.png'><script>console.error('told')</script>",
        encoding="utf-8",
    )
    browser.screen(390)
    browser.open(file.as_uri())
    assert [item.partition(":")[0] for item in browser.evaluate(FAINT)] == ["P."]
    assert [item.partition(":")[0] for item in browser.evaluate(BEYOND)] == ["DIV."]
    assert "https://example.org/x.png" in browser.requests
    assert "told" in browser.complaints
