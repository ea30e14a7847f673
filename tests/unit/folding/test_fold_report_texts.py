"""The fold report as a person reads it, and the JSON that a manifest keeps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import bnexport
from bnexport.folding.fold_report import FoldReport, FoldRow

FOLDED = FoldRow("conv.bn", "BatchNorm2d", "backward", rule="into what comes before", into="conv", channels=8)
TANH = FoldRow(
    "norm", "BatchNorm2d", "affine", reason="before: it follows tanh, which no rule moves a scale and shift across",
    hint="a linear layer after it", channels=4,
)  # fmt: skip
SUM = FoldRow(
    "shift", "BatchNorm2d", "affine", rule="scale after, one addition stays", into="conv2", reason="after: it pads"
)
KEPT = FoldRow("stat", "BatchNorm1d", "kept", reason="it is in training mode, so it uses batch statistics")


class Net(nn.Module):
    """One norm folds, one stays behind tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        for norm in (self.bn, self.last):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.last(torch.tanh(self.bn(self.conv(x)))))


@pytest.mark.parametrize(
    ("rows", "summary"),
    [
        ((), "no BatchNorm call found, nothing to fold"),
        ((FOLDED,), "1 of 1 BatchNorm call folded"),
        ((FOLDED, FOLDED), "2 of 2 BatchNorm calls folded"),
        ((FOLDED, TANH), "1 of 2 BatchNorm calls folded, 1 became an affine layer (before: it follows tanh)"),
        (
            (FOLDED, TANH, replace(TANH, reason="after: it is an output of the model")),
            "1 of 3 BatchNorm calls folded, 2 became affine layers (2 different reasons)",
        ),
        (
            (FOLDED, SUM, KEPT, KEPT),
            "1 of 4 BatchNorm calls folded, 1 became an addition (after: it pads),"
            " 2 were kept unchanged (it is in training mode)",
        ),
    ],
)
def test_the_summary_states_what_happened(rows: tuple[FoldRow, ...], summary: str) -> None:
    report = FoldReport(rows, 0)
    assert report.summary() == summary
    assert str(report).splitlines()[0] == summary


def test_a_printed_report_has_80_columns_and_every_reason() -> None:
    rows = (FOLDED, TANH, replace(TANH, module="a" * 50 + ".norm"), replace(KEPT, module="\x1b[31m<b>"))
    report = FoldReport(rows, 3, 2.5e-15, 1.25, ("bn7: a fold failed its proof and was rolled back",))
    text = str(report)
    table = text.split("\n\n")[1].splitlines()
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert [line.split()[:2] for line in table[2:]] == [
        ["backward", "conv.bn"],
        ["affine", "norm"],
        ["affine", f"...{'a' * 18}.norm"],
        ["kept", "?[31m<b>"],
    ]
    whole = " ".join(text.split())
    assert f"{TANH.reason}. To fold it: {TANH.hint}" in whole
    assert whole.count(TANH.reason) == 1, "calls with the same reason share one note"
    assert "WARNING: bn7: a fold failed its proof" in whole
    assert "2.5e-15 of scale" in whole
    assert "1.25 times as many elements" in whole


def test_of_many_calls_the_folded_ones_are_counted() -> None:
    report = FoldReport((*[replace(FOLDED, module=f"block{index}") for index in range(40)], TANH), 1)
    lines = str(report).splitlines()
    assert lines[0].startswith("40 of 41 BatchNorm calls folded")
    assert [line.split()[:2] for line in lines if "into what comes before" in line] == [["40", "backward"]]
    assert "block7" not in str(report)
    assert "norm" in str(report)


def test_a_notebook_gets_a_table_with_every_reason_and_no_markup_of_the_network() -> None:
    page = FoldReport((FOLDED, replace(TANH, module="<script>")), 1, 1e-15)._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert TANH.reason in page
    assert TANH.hint in page
    assert page.startswith("<p><b>1 of 2 BatchNorm calls folded")
    assert page.count("<tr>") == 3


@pytest.mark.parametrize("function", [bnexport.fold, bnexport.fold_modules])
def test_the_result_of_a_fold_prints_its_report(function: object) -> None:
    result = function(Net().eval(), torch.randn(2, 3, 8, 8))  # type: ignore[operator]
    lines = str(result).splitlines()
    assert lines[0] == result.summary() == result.report.summary()
    assert lines[0].startswith("1 of 2 BatchNorm calls folded, 1 ")
    assert max(map(len, lines[1:])) <= 80
    assert result._repr_html_() == result.report._repr_html_()


def test_a_stored_report_keeps_its_keys() -> None:
    report = FoldReport((FOLDED, TANH), 1, 1e-15, 1.0, ("w",))
    value = report.to_json()
    assert value["rows"][1]["unlock"] == TANH.hint
    keys = {
        "module",
        "kind",
        "outcome",
        "rule",
        "into",
        "equation",
        "reason",
        "unlock",
        "channels",
        "gain",
        "dead",
        "error",
    }
    assert set(value["rows"][0]) == keys
    assert FoldReport.from_json(value) == report
    assert TANH.unlock == TANH.hint, "the former name of the attribute"
