"""``bnexport benchmark`` on a small bundle: real processes, bad input, files, and the exit codes."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from support.bundles import copy_bundle, reseal

from bnexport.benchmarking import benchmark as module
from bnexport.benchmarking.benchmark_report import BenchmarkReport
from bnexport.bundle import MODEL_ONNX, MODEL_TORCHSCRIPT, TUNED, Bundle
from bnexport.cli.main import run
from bnexport.verification import budget as verifying

ONE = shlex.split("--runtime onnxruntime-cpu --batch 1,2 --threads 1 --sessions 1 --seconds 0.1 --rounds 5")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, work in (("_REAL_WORK", 3e7), ("_SYNTHETIC_WORK", 3e7), ("_PROOF_WORK", 9e6)):
        monkeypatch.setattr(verifying, name, work)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report an idle machine: other tests run at the same time, so it is busy."""
    monkeypatch.setattr(BenchmarkReport, "busy", "")


@pytest.mark.usefixtures("idle")
def test_it_measures_recommends_saves_and_writes_every_file(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    files = [str(tmp_path / name) for name in ("report.json", "report.html", "plot.svg")]
    written = [word for pair in zip(("--json", "--html", "--plot"), files, strict=True) for word in pair]
    against = ["--against", str(folder / MODEL_ONNX)]
    assert run(["benchmark", str(folder), *ONE, *against, "--save", *written]) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.partition("img/s")[2].partition("txs:")[0].splitlines())) <= 80
    assert [line.partition(":")[0] for line in shown.out.splitlines()[:1]] == ["lowest latency"]
    assert "measuring: " in shown.err
    report = json.loads(Path(files[0]).read_text())
    assert (report["format"], len(report["results"]), len(report["recommendations"])) == ("bnexport-benchmark", 4, 3)
    rows = [item for item in report["results"] if item["bundle"] == "A"]
    assert {item["verdict"] for item in rows} == {"PASS"}
    assert {item["verified"] for item in rows} == {"now"}, "the bundle's manifest has no verdict"
    assert all(item["golden_error"] <= 1e-5 and item["calls"] > 15 and item["cpu_us_per_image"] > 0 for item in rows)
    assert all(item["load_ms"] > 0 and item["file_bytes"] == (folder / MODEL_ONNX).stat().st_size for item in rows)
    assert {item["verdict"] for item in report["results"] if item["bundle"] == "-"} == {"-"}
    assert json.loads((folder / TUNED).read_text())["choices"].keys() == {"latency", "throughput", "cpu"}
    page = Path(files[1]).read_text()
    assert page.count("<svg") == 1
    assert "lowest latency" in page
    assert "<script" not in page
    assert Path(files[2]).read_text().startswith("<svg")


def test_a_bundle_that_fails_is_measured_and_never_recommended(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], idle: None
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    model = onnx.load(folder / MODEL_ONNX)
    weight = next(item for item in model.graph.initializer if len(item.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    onnx.save(model, folder / MODEL_ONNX)
    reseal(folder)
    assert run(["benchmark", str(folder), *ONE, "--save"]) == 1
    shown = capsys.readouterr().out
    assert "No winner is named: no measured variant has the verdict PASS and right answers." in " ".join(shown.split())
    assert "FAIL A onnxruntime-cpu: " in shown
    assert "WRONG A onnxruntime-cpu, batch 1, 1 thread, 1 session: the error on the golden vectors" in shown
    assert not (folder / TUNED).exists()
    assert run(["benchmark", str(folder), str(bundle.path), *ONE, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {report["results"][item["row"]]["bundle"] for item in report["recommendations"]} == {"B"}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--runtime", "tensorflow"], 2, "'tensorflow' is not one of"),
        (["--batch", "0"], 2, "--batch is 0"),
        (["--batch", "1,x"], 2, "--batch '1,x' is not a list of whole numbers"),
        (["--threads", "0"], 2, "--threads is 0"),
        (["--threads", "-1"], 2, "--threads '-1' is not a list of whole numbers"),
        (["--sessions", "5000"], 2, "--sessions is 5000, but this process has"),
        (["--sessions", ""], 2, "--sessions '' is not a list of whole numbers"),
        (["--rounds", "2"], 2, "2 is not in the range x>=5"),
        (["--against", "none.onnx"], 2, "none.onnx is not a file"),
        (["--against", "README"], 2, "can't be run"),
        (["--plot", "plot.png"], 2, "--plot plot.png is not a .svg file"),
        (["--json", "a.svg", "--plot", "./a.svg"], 2, "two results would be written to a.svg"),
        (["--runtime", "torch-cuda"], 3, "torch-cuda can't run here"),
    ],
)
def test_bad_input_is_one_sentence(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], code: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("README").write_text("not an ONNX file\n")
    if "torch-cuda" in options:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = [] if "--runtime" in options else ["--runtime", "onnxruntime-cpu"]
    assert run(["benchmark", str(bundle.path), *base, *options]) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("options", [[], ["--runtime", "onnxruntime-cpu"]])
def test_a_missing_onnxruntime_exits_with_its_remedy(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run(["benchmark", str(bundle.path), *options]) == 3
    shown = capsys.readouterr()
    assert "bnexport benchmark needs onnxruntime-gpu[cuda,cudnn], which is not installed" in shown.err
    assert "pip install onnxruntime-gpu[cuda,cudnn]" in " ".join(shown.err.split())
    assert shown.out == ""


def test_two_names_of_one_bundle_and_folders_without_a_bundle(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(bundle.path)
    assert run(["benchmark", str(bundle.path), str(tmp_path / "link")]) == 2
    assert "are the same bundle" in capsys.readouterr().err
    assert run(["benchmark", str(tmp_path)]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_an_interrupt_prints_what_was_measured(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls, number = module.Worker.measure, [], signal.SIGINT

    def interrupted(self: Any, batch: int, seconds: float) -> Any:
        calls.append(batch)
        if len(calls) > 4:
            signal.raise_signal(number)
        return real(self, batch, seconds)

    monkeypatch.setattr(module.Worker, "measure", interrupted)
    assert run(["benchmark", str(bundle.path), *ONE]) == 130
    shown = capsys.readouterr()
    assert "No winner is named: the measurement was interrupted." in shown.out
    assert shown.out.count("1x1") == 2
    assert shown.err.endswith("Interrupted. Files already complete are kept; nothing is half-written.\n")
    calls.clear()
    number = signal.SIGTERM
    assert run(["benchmark", str(bundle.path), *ONE, "--json", "-"]) == 130
    report = json.loads(capsys.readouterr().out)
    assert report["interrupted"] is True
    assert len(report["results"]) == 2


def test_a_result_that_can_not_be_written_is_refused_before_the_measurement(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "benchmark", None)  # calling it would be an error of another kind
    (tmp_path / "file").touch()
    for place, words in (
        (tmp_path, f"{tmp_path} is a folder"),
        (tmp_path / "file" / "x.json", f"there is a file, not a folder, at {tmp_path / 'file'}"),
    ):
        assert run(["benchmark", str(bundle.path), *ONE, "--json", str(place)]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_bundle_that_can_not_be_written_is_refused_before_the_measurement(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "benchmark", None)
    monkeypatch.setattr("bnexport.files.os.access", lambda _, mode: mode == os.R_OK)  # root may write in every folder
    assert run(["benchmark", str(bundle.path), *ONE, "--save"]) == 2
    assert f"{TUNED} can't be written: this user may not write in" in " ".join(capsys.readouterr().err.split())


def test_a_cut_off_model_is_bad_input(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    (folder / MODEL_ONNX).write_bytes((folder / MODEL_ONNX).read_bytes()[:1000])
    assert run(["benchmark", str(folder), *ONE]) == 2
    assert "model.onnx" in capsys.readouterr().err


def test_runtimes_that_the_bundle_has_no_file_for_name_the_others(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    (folder / MODEL_TORCHSCRIPT).unlink(missing_ok=True)
    reseal(folder)
    assert run(["benchmark", str(folder), "--runtime", "torchscript-cpu", "--quick"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "the bundle was written without model.pt" in shown
    assert "CPU runtimes for the files: " in shown
    assert "onnxruntime-cpu" in shown


def test_a_busy_machine_saves_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    monkeypatch.setattr(BenchmarkReport, "busy", "other processes used 50% of this machine's CPU time")
    assert run(["benchmark", str(folder), *ONE, "--save"]) == 3
    shown = capsys.readouterr()
    assert shown.out.startswith("No winner is named: other processes used 50%")
    assert "tuned.json is not written: other processes used 50%" in shown.err
    assert not (folder / TUNED).exists()
