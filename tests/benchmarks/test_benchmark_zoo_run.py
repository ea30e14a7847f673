"""The run over many networks: one process each, resumable, and the page that is made of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.__main__ import write_document
from benchmarks.zoo.run import ZooRun, read_lines, run_zoo
from bnexport.errors import DataError, UsageError


def test_each_network_gets_a_line_and_is_not_measured_twice(tmp_path: Path) -> None:
    out, reported = tmp_path / "runs" / "zoo.jsonl", []
    run = ZooRun(out, ("torchvision:squeezenet1_1", "torchvision:resnet1818"), ("fold",), jobs=1, seconds=120)
    lines = {line["name"]: line for line in run_zoo(run, on_line=reported.append) if line["part"] == "fold"}
    assert lines["torchvision:squeezenet1_1"]["result"] == {"shape": [3, 64, 64], "norms": 0}
    assert "has no model 'resnet1818'" in lines["torchvision:resnet1818"]["problem"]
    assert len(reported) == 2
    before = out.read_bytes()
    assert run_zoo(run, on_line=reported.append) == read_lines(out)
    assert out.read_bytes() == before
    limited = ZooRun(out, ("torchvision:alexnet", "torchvision:squeezenet1_1"), ("tools",), limit=1, seconds=0.01)
    late = [line for line in run_zoo(limited) if line["part"] == "tools"]
    assert [(line["name"], line["problem"]) for line in late] == [("torchvision:alexnet", "longer than 0.01 s")]
    assert len([line for line in read_lines(out) if line["part"] == "conditions"]) == 2


def test_the_last_line_of_a_network_counts(tmp_path: Path) -> None:
    old, new = (
        {"part": "fold", "name": "timm:x", "problem": "old"},
        {"part": "fold", "name": "timm:x", "problem": "new"},
    )
    (tmp_path / "zoo.jsonl").write_text(f"{json.dumps(old)}\n{json.dumps(new)}\n")
    assert read_lines(tmp_path / "zoo.jsonl") == [new]


@pytest.mark.parametrize("text", ["{", "[1]", '{"part": "fold"}', "7"])
def test_another_file_is_refused_by_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.jsonl").write_text(f'{{"part": "fold", "name": "timm:x"}}\n{text}\n')
    with pytest.raises(DataError, match="line 2 of"):
        read_lines(tmp_path / "other.jsonl")
    with pytest.raises(DataError, match="can't be read"):
        read_lines(tmp_path / "missing.jsonl")


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no part 'speed'"):
        run_zoo(ZooRun(tmp_path / "x", parts=("speed",)))
    with pytest.raises(UsageError, match="names no network"):
        run_zoo(ZooRun(tmp_path / "x", ("resnet18",)))


def line(name: str, part: str, **result: Any) -> dict[str, Any]:
    return {"name": name, "part": part, "result": {"shape": [3, 64, 64], "norms": 3, **result}, "seconds": 1.0}


def folded(name: str, *, wrong: bool = False, remaining: int = 1) -> dict[str, Any]:
    spread = {"low": 0.5, "middle": 0.6, "high": 0.7, "n": 3}
    return line(
        name, "fold", calls=3, outcomes={"adjacent": {"backward": 1}, "apart": {"through": 1, "affine": 1}, "arithmetic": {}},
        reasons={"it follows a|b": 1}, remaining=remaining, error=2e-15, warnings=[],
        cost=dict.fromkeys(("trace", "fold", "proved", "ratio", "ratio_proved"), spread), check_error=2e-7, check_noise=1e-7,
        wrong=wrong, varies=0.5,
    )  # fmt: skip


def test_the_page_shows_totals_targets_and_failures(tmp_path: Path) -> None:
    conditions = {
        "part": "conditions", "name": "fold", "seed": 0, "jobs": 2, "cpu": "a processor", "cores": 2, "gpu": None,
        "python": "3.11", "packages": {"torch": "2.14"},
    }  # fmt: skip
    left = {"before": 3, "torch.onnx.export": 2, "onnxruntime": 2}
    lines = [
        conditions,
        folded("timm:right"),
        line("timm:right", "tools", left=left, failed={"onnxslim": "ValueError: x"}, seconds={}),
        folded("torchvision:broken", wrong=True, remaining=2),
        {"name": "timm:untraced", "part": "fold", "problem": "UntracedError: it can't", "seconds": 1.0},
        {"name": "timm:plain", "part": "fold", "result": {"shape": [3, 64, 64], "norms": 0}, "seconds": 1.0},
    ]
    write_document(lines, tmp_path / "zoo.md")
    text = (tmp_path / "zoo.md").read_text()
    for part in (
        "a processor (2 cores), Python 3.11, torch 2.14; seed 0",
        "4 networks, 3 of them with BatchNorm; 2 folded, with 6 BatchNorm calls: 2 adjacent",
        "| torch.onnx.export | 1 | 3 | 2 | 1 |",
        "- No network wrong: missed by 1 (torchvision:broken)",
        "- No fold failed its own proof: met",
        "- No adjacent BatchNorm left: met",
        "- Apart and gone: 2 of 4 (50.0 %)",
        "- No more norm operators in the graph than in the fold report: missed by 1 (torchvision:broken)",
        "| 2 | 2 | it follows a\\|b |",
        "2.0e-07 (1.0e-07) WRONG",
        "| timm:untraced | fold | UntracedError: it can't |",
        "| timm:right | onnxslim | ValueError: x |",
        "Without BatchNorm: timm:plain.",
    ):
        assert part in text, part


def test_a_page_of_the_tools_alone(tmp_path: Path) -> None:
    write_document([line("timm:x", "tools", left={"before": 3, "onnxslim": 1}, failed={})], tmp_path / "zoo.md")
    text = (tmp_path / "zoo.md").read_text()
    assert "| timm:x | 64 | 3 | - | - | - | - | - | - | - | - | 1 |" in text
    assert "None." in text
