from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bnexport.bundle import Manifest
from bnexport.folding.report import OUTCOMES, FoldReport
from bnexport.reporting.figures import Samples
from bnexport.reporting.html import OPEN_CALLS, STAGES, render_report
from bnexport.verification.tolerances import TOLERANCES
from bnexport.verification.verdict import REQUIRED_STAGES, VerificationReport

VOID = {"meta", "img", "br", "hr", "link", "input"}
COMMANDS = ["bnexport train --out runs/x", "bnexport verify models/<name>/1 && echo 'done'"]
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


def test_page_is_self_contained(render: Render, passing: VerificationReport, samples: Samples) -> None:
    text = render(verification=passing, samples=samples)
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    sources = [
        value for _, name, value in page.attributes if name in ("src", "href", "srcset", "poster", "data", "action")
    ]
    assert len(sources) == 3
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    style = "".join(re.findall("<style>(.*?)</style>", text, re.DOTALL))
    assert style
    assert "url(" not in style
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


def test_an_incomplete_report_is_no_proof(render: Render) -> None:
    words = Page(render(verification=VerificationReport(()))).words
    assert words.split()[6] == "FAIL"
    assert f"Nothing was checked in: {', '.join(REQUIRED_STAGES)}" in words


def test_everything_is_told(render: Render, passing: VerificationReport) -> None:
    words = " ".join(Page(render(verification=passing)).words.split())
    for expected in (
        "4 of 7 BatchNorm calls gone, 3 norm operations left in the graph; the weights are 1.25 times as large",
        "conv <- batch norm",
        "W' = s W, b' = s b + t",
        "(root) BatchNorm1d",
        "it follows relu",
        "would go with: gammas of one sign",
        "0.25..3.2",
        "2.3e-16",
        "3.1e-15",
        "strict: worst error 3.8e-07 of the scale, bound 1e-05",
        "Not covered: torch-cuda",
        "input: float32 (batch, 1, 28, 28)",
        "ONNX opset 18",
        "a processor",
        "torch 2.15.0",
        "bnexport verify models/<name>/1 && echo 'done'",
        "1000 test images",
        "accuracy: correct 871",
        "CPUExecutionProvider",
    ):
        assert expected in words, expected


def test_warnings_stand_in_the_verdict_and_before_the_calls(render: Render, passing: VerificationReport) -> None:
    words = " ".join(Page(render(verification=passing)).words.split())
    first, second = (match.start() for match in re.finditer("WARNING: ", words))
    assert first < words.index("What was folded") < second < words.index("(root) BatchNorm1d")


def test_many_calls_are_counted_first_and_listed_on_a_click(
    render: Render, passing: VerificationReport, large: FoldReport
) -> None:
    text = render(verification=passing, fold=large)
    words = " ".join(Page(text).words.split())
    section = text[text.index("What was folded") : text.index("<h2>Verification")]
    assert re.findall(r"<details( open)?>", section) == [" open", ""]
    assert section.index("200") < section.index("The 3 that are not gone") < section.index("All 250 BatchNorm calls")
    assert section.index(OUTCOMES["through"]) < section.index("<details")
    assert words.count("stage0.block0.norm") == 1
    short = render(verification=passing, fold=FoldReport(large.rows[:OPEN_CALLS], 0))
    assert "<details" not in short[short.index("What was folded") : short.index("<h2>Verification")]


def test_hostile_texts_stay_text(render: Render, passing: VerificationReport, failing: VerificationReport) -> None:
    for report in (passing, failing):
        text = render(verification=report)
        page = Page(text)  # which also refuses tags that a label could have closed
        assert "<script" not in text
        assert "<img src=//" not in text
        assert "<script>alert('x')</script><img src=//example.org/x.png onerror=alert(1)>" in page.words


def test_same_arguments_same_bytes(render: Render, passing: VerificationReport, samples: Samples) -> None:
    assert render(verification=passing, samples=samples) == render(verification=passing, samples=samples)


def test_a_report_read_back_gives_the_same_page(render: Render, failing: VerificationReport) -> None:
    assert render(verification=VerificationReport.from_json(failing.to_json())) == render(verification=failing)


def test_tables_name_every_stage_and_outcome(fold: FoldReport) -> None:
    assert set(TOLERANCES) | set(REQUIRED_STAGES) <= set(STAGES)
    assert {row.outcome for row in fold.rows} == set(OUTCOMES)


@pytest.mark.needs("chromium")
def test_page_fits_a_phone_and_asks_for_nothing(
    tmp_path: Path, render: Render, failing: VerificationReport, samples: Samples
) -> None:
    (tmp_path / "page.html").write_text(render(verification=failing, samples=samples), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        "<!DOCTYPE html><meta charset=utf-8><body>"
        + "".join(f'<iframe src="page.html" width="{width}" height="600"></iframe>' for width in (360, 1200))
        + "<script>onload = () => { for (const frame of document.querySelectorAll('iframe')) {"
        "  const page = frame.contentDocument.documentElement;"
        "  const images = [...frame.contentDocument.images].filter(image => image.naturalWidth > 0).length;"
        "  document.body.append(`[${page.scrollWidth} of ${page.clientWidth}, ${images} images]`); } };</script>",
        encoding="utf-8",
    )
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        command = ["chromium", "--headless", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        address = f"http://127.0.0.1:{server.server_port}/frame.html"
        done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    found = re.findall(r"\[(\d+) of (\d+), (\d+) images\]", done.stdout)
    assert len(found) == 2, done.stdout[-500:]
    for scroll, client, images in found:
        assert int(client) > 300
        assert int(scroll) <= int(client), "the page scrolls sideways"
        assert images == "3"
    assert set(asked) <= {"/frame.html", "/page.html", "/favicon.ico"}
