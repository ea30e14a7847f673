import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from support.reports import full_report, large_report

from bnexport.environment import environment
from bnexport.folding.fold_report import OUTCOMES, FoldReport, FoldRow
from bnexport.plain_table import printable
from bnexport.reporting.tables import (
    LEGEND,
    STYLES,
    make_console,
    not_run,
    print_environment,
    print_fold_report,
    print_verification,
)
from bnexport.verification.verdict import VerificationReport

WHAT_BECAME = "4 of 7 BatchNorm calls folded, 1 became an affine layer, 2 were kept unchanged"
ENCODINGS = ("utf-8", "ascii", "latin-1")


def printed(show: Callable[..., None], value: object, encoding: str = "ascii", width: int = 80) -> str:
    """Return the text that a function prints on a console of this encoding."""
    raw = io.BytesIO()
    console = make_console()
    console.file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    console.width = width
    show(value, console)
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_fold_report_fits_80_columns_and_any_encoding(fold: FoldReport, encoding: str) -> None:
    text = printed(print_fold_report, fold, encoding)
    lines = text.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert "the weights are 1.25 times as large as before: shared ones had to be cloned" in lines
    assert lines[0].startswith(WHAT_BECAME)
    assert "backward, forward, through, merged: gone, now part of other layers' weights" in lines
    assert "affine: left as one scale and one shift per channel" in lines
    text = printed(print_fold_report, fold, encoding, width=200)
    assert "0; 1 dead channel" in text
    assert "would go with: gammas of one sign" in text
    assert "0.25..3.2" in text
    assert "(root)" in text
    assert "second consumer" in text
    assert "\x1b[31m" not in text, "a module path must not steer the terminal"
    assert "<script>" in text, "markup is printed as it is"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_of_many_calls_those_that_are_gone_are_counted(large: FoldReport, encoding: str) -> None:
    text = printed(print_fold_report, large, encoding)
    lines = text.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert len(lines) < 60
    counted = [line.replace("|", " ").split()[:2] for line in lines[1:] if re.match(r"\W*\d+\W+[a-z]+", line)]
    assert counted == [["200", "backward"], ["47", "through"], ["3", "affine"]]
    assert " ".join(lines[1:]).count("it follows relu") == 3
    assert lines[0] == "247 of 250 BatchNorm calls folded, 3 became affine layers"


def test_thirty_calls_are_listed_one_by_one(large: FoldReport) -> None:
    for count, listed in ((30, 30), (31, 0)):
        assert printed(print_fold_report, FoldReport(large.rows[:count], 0), width=120).count("block") == listed


def test_a_long_reason_is_short_in_the_table_and_whole_in_the_json() -> None:
    before = "before: the output of max_pool2d (features.pool0) has a second consumer, which needs it as it is"
    after = "after: across relu it would become a bound per channel, which ONNX Runtime computes no faster"
    row = FoldRow("norm1", "BatchNorm2d", "affine", reason=f"{before}; {after}", hint="--clamps", channels=64)
    shift = replace(row, module="norm2", rule="scale after, one addition stays")
    report = FoldReport((row, shift, replace(row, outcome="backward", reason="", hint="", into="conv", rule="r")), 1)
    text = printed(print_fold_report, report)
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert len(text.splitlines()) <= 20
    assert "second" in text
    assert "ONNX Runtime" not in text
    assert "--json prints them whole" in text
    assert text.startswith("1 of 3 BatchNorm calls folded, 1 became an addition, 1 became an affine layer\n")
    assert report.to_json()["rows"][0]["reason"] == f"{before}; {after}"


def test_warnings_come_first(fold: FoldReport) -> None:
    line = printed(print_fold_report, fold, width=200).splitlines()[1]
    assert line.startswith("WARNING: </td><script>")
    assert "a fold failed its proof and was rolled back" in line


def test_every_outcome_has_a_colour() -> None:
    assert set(OUTCOMES) <= set(STYLES)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_verdict_is_a_word_on_the_first_line(passing: VerificationReport, encoding: str) -> None:
    lines = printed(print_verification, passing, encoding).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == passing.summary() == "PASS: 8 comparisons on 1000 test images"
    runs = [line.replace("|", " ").split() for line in lines if "PASS" in line and "-cpu" in line]
    assert runs == [
        ["PASS", "onnxruntime-cpu", "2.1e-07", "3.8e-07", "-", "-", "0", "99.8", "%"],
        ["PASS", "torch-cpu", "-", "3.8e-07", "-", "-", "0", "99.8", "%"],
    ]
    proof = next(line for line in lines if "file-proof" in line)
    numbers = ["64", "4.4e-08", "1e-06", "exact", "in", "float64"]
    assert proof.replace("|", " ").split() == ["PASS", "file-proof", "model.onnx", *numbers]
    assert "strict: full float32 arithmetic; max error at most 1e-05" in lines
    assert set(LEGEND) <= set(lines), "each column of the table has its line"
    assert "not run: torch-cuda: torch sees no CUDA device" in lines


def test_failures_are_named_with_their_reasons(failing: VerificationReport) -> None:
    lines = printed(print_verification, failing, width=200).splitlines()
    assert lines[0].startswith("FAIL: 2 of 10 comparisons failed")
    assert "FAIL strict, onnxruntime-cpu, ones: 12 values are not finite" in lines
    assert any(line.startswith("FAIL strict, torch-cpu, zeros: </td><script>") for line in lines)
    assert all(line.startswith("FAIL ") for line in lines[1:3]), "the causes follow the verdict"
    table = [line.strip("|").split() for line in lines if line.startswith("|FAIL")]
    assert [row[0] for row in table] == ["FAIL", "FAIL"]
    assert all("FAIL" in row[2:] for row in table), "the stage that failed shows it"


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "report", [full_report(), full_report(passed=True), large_report()], ids=["fail", "pass", "large"]
)
def test_every_report_fits_80_columns(report: VerificationReport, encoding: str) -> None:
    lines = printed(print_verification, report, encoding).splitlines()
    # Only the verdict is longer: a program reads it as one line.
    assert max(map(len, lines[1:])) <= 80
    assert lines[0] == printable(report.summary())
    assert "\x1b[31m" not in "".join(lines)


def words_of(report: VerificationReport) -> str:
    return " ".join(printed(print_verification, report, "utf-8", width=200).split())


def test_everything_that_was_found_is_shown_in_short() -> None:
    words = words_of(full_report())
    for expected in (
        "PASS onnxruntime-cuda, tf32 0.00038 0.00076 1.3 0.00019 3 98.7 %",
        "FAIL torchscript-cpu - FAIL - - 3 99 %",
        "strict: full float32 arithmetic; max error at most 1e-05",
        "shipping: the precision that is served; max error at most 0.0017",
        "predicted in tf32: max error 0.00076, 1 of 2000 labels changed (images)",
        "predicted in bfloat16: max error 0.009 (noise)",
        "onnxruntime-cuda, tf32: tf32 requested: it is",
        "accuracy: 871 of 1000 labels right before, 870 after (2 lost, 1 won; exact McNemar p = 1): torch-cpu;"
        " onnxruntime-cuda; onnxruntime-cuda, tf32",
        "onnxruntime-cuda, tf32: conv3 (Conv) is the first layer with more than its predicted error: 0.002, 0.00018",
        "label changed, sample 2: 0 -> 3 (true 0), margin 0.001, NOT explained; onnxruntime-cuda, tf32; torchscript-cpu",
        "MISSED one flipped bit",
        "caught eps dropped model.onnx file-proof file-proof, golden",
        "self-test: 5 faults: 1 MISSED, 1 not tried here, 1 harmless to this model, 2 caught",
        "not run: the float64 proof was not repeated here: onnx is not installed",
        "synthetic inputs can't show flips",
    ):
        assert expected in words, expected


def test_flips_are_listed_up_to_a_number() -> None:
    words = words_of(large_report())
    assert words.count("label changed, sample ") == 8
    assert "and 492 more changed labels: --json lists them" in words


DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
LOADER = "no NVIDIA driver (libcuda.so.1: cannot open shared object file: No such file or directory)"
SKIPPED = {
    "torch-cuda": DRIVER,
    "torchscript-cuda": DRIVER,
    "torch-export-cuda": DRIVER,
    "onnxruntime-cuda": LOADER,
    "onnxruntime-tensorrt": f"{LOADER}; TensorRT's provider can't be loaded (libnvinfer.so.10: no such file)",
    "openvino-cpu, bfloat16": "this CPU has no bfloat16, so OpenVINO's bfloat16 kernels are its float32 kernels",
    "weights": "x" * 100,
}


def test_runtimes_that_were_not_run_for_one_cause_are_one_line() -> None:
    assert not_run(SKIPPED) == [
        "not run: 5 GPU runtimes: no NVIDIA driver (--verbose lists them)",
        "not run: openvino-cpu, bfloat16: this CPU has no bfloat16",
        f"not run: weights: {'x' * 58} ...",
    ]
    assert not_run({"torch-cpu": "torch is not installed", "torchscript-cpu": "torch is not installed"}) == [
        "not run: torch-cpu, torchscript-cpu: torch is not installed"
    ]
    whole = not_run(SKIPPED, verbose=True)
    assert len(whole) == len(SKIPPED)
    assert f"not run: onnxruntime-cuda: {LOADER}" in whole


def test_no_cell_of_the_fold_table_has_more_than_five_lines() -> None:
    path = "features.denseblock1.denselayer1.norm1"
    reason = "before: " + "the output of this operation is needed by another one as it is " * 8
    report = FoldReport((FoldRow(path, "BatchNorm2d", "affine", reason=reason, channels=1024),), 1)
    lines = [line for line in printed(print_fold_report, report).splitlines() if line.startswith("|")]
    assert len(lines) <= 7  # with the head


def test_a_missed_fault_is_the_verdict() -> None:
    report = full_report(passed=True).with_self_test(full_report().findings.self_test or ())
    assert "FAIL: the self-test missed 1 faults, first one flipped bit" in words_of(report)
    assert "self-test" not in words_of(VerificationReport(report.rows))


def test_no_picture_is_made_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving machines have no pillow."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "markupsafe", None)
    assert "label changed, sample 2" in words_of(full_report())


def test_an_empty_report_fails_and_prints() -> None:
    assert printed(print_verification, VerificationReport(())).startswith("FAIL: nothing was checked")
    assert "no BatchNorm call found, nothing to fold" in printed(print_fold_report, FoldReport((), 0))


def test_environment_shows_versions() -> None:
    assert f"Python {sys.version.split()[0]}" in printed(print_environment, environment(), width=1000)


def test_stdout_in_ascii_does_not_crash() -> None:
    code = (
        "from bnexport.folding.fold_report import FoldReport, FoldRow\n"
        "from bnexport.reporting.tables import make_console, print_fold_report\n"
        "row = FoldRow('\\u5c42.\\u00e9', 'BatchNorm2d', 'kept', reason='\\u2192', channels=3, gain=(1.0, 2.0))\n"
        "print_fold_report(FoldReport((row,), 1), make_console())\n"
    )
    environ = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"?.?" in done.stdout
    assert done.stdout.isascii()


def test_make_console_chooses_the_stream() -> None:
    assert make_console(stderr=True).stderr
    assert not make_console().stderr
