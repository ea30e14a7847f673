import io
import json
import math

import pytest
from rich.console import Console

from bnexport.auditing.tool_table import AuditReport, AuditRow
from bnexport.environment import environment
from bnexport.reporting.results import explanation, print_audit
from bnexport.reporting.tables import make_console

WRONG = AuditRow("torch.fx.fuse", "wrong", False, 0, 0.25, "output 1", 3, "layer1.0.bn1\x1b[31m", "", (2, 2, 3, 5))
REPORT = AuditReport(
    (
        AuditRow("torch.eager", "right", True, 61, 4.1e-7, batches=(2, 2, 3, 5)),
        AuditRow("torch.jit.optimize_for_inference", "right", False, 17, 4.6e-7, batches=(2, 2, 3, 5)),
        WRONG,
        AuditRow("onnxruntime-extended", "wrong", False, None, math.inf, "output", None, "", "it is \u221e"),
        AuditRow("onnxsim", "not run", reason="it is not installed"),
        AuditRow("torch.onnx.export", "failed", reason="ValueError: " + "no " * 60),
    ),
    1e-5,
    "the larger of 1e-05 and 10 x the error of torch.eager",
    0,
    (2, 2, 3, 5),
    ("1 BatchNorm layer was never trained",),
    environment(),
)


def printed(encoding: str, report: AuditReport = REPORT) -> list[str]:
    raw = io.BytesIO()
    console: Console = make_console()
    console.file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    console.width = 80
    print_audit(report, console=console)
    return raw.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_the_table_fits_80_columns_and_any_encoding(encoding: str) -> None:
    lines = printed(encoding)
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1] == "wrong: 2 of 3 tools: torch.fx.fuse, onnxruntime-extended"
    cells = [line.replace("|", " ").split() for line in lines]
    assert ["wrong", "torch.fx.fuse", "0", "0.25", "1e-05"] in cells
    assert ["wrong", "onnxruntime-extended", "-", "inf", "1e-05"] in cells
    assert ["control", "torch.eager", "61", "4.1e-07", "-"] in cells
    assert ["not", "run", "onnxsim", "-", "-", "-"] in cells
    text = " ".join(" ".join(lines).split())
    assert "not run: onnxsim: it is not installed" in text
    assert "note: 1 BatchNorm layer was never trained" in text
    assert "batches of 2, 2, 3, 5, seed 0" in text
    assert "\x1b" not in text, "a module path must not steer the terminal"


def test_the_explanation_of_a_wrong_tool() -> None:
    assert explanation(WRONG).startswith("worst in output 1, channel 3; first wrong at BatchNorm layer1.0.bn1")
    assert explanation(REPORT.rows[3]) == "it is \u221e"
    assert explanation(REPORT.rows[1]) == ""


def test_json_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    print_audit(REPORT, as_json=True)
    value = json.loads(capsys.readouterr().out)
    assert value["passed"] is False
    assert value["tools"][3]["error"] is None
