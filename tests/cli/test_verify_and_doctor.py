import html
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bundles import copy_bundle, reseal

from bnexport.bundle import Bundle
from bnexport.cli.main import run
from bnexport.cli.output import counting
from bnexport.environment import environment
from bnexport.runtimes import doctor
from bnexport.runtimes.catalogue import RUNNERS
from bnexport.runtimes.cuda_libraries import Conflict
from bnexport.runtimes.doctor import Diagnosis, Health
from bnexport.verification import budget as verifying
from bnexport.verification import stages
from bnexport.verification.self_test import faults
from bnexport.verification.self_test.faults import Fault

FAST = ["--runtime", "onnxruntime-cpu"]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "_REAL_WORK", 3e7)
    monkeypatch.setattr(verifying, "_SYNTHETIC_WORK", 3e7)
    monkeypatch.setattr(verifying, "_PROOF_WORK", 9e6)


def test_verify_passes_and_writes_json(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(bundle.path), *FAST, "--json", str(tmp_path / "report.json")]) == 0
    captured = capsys.readouterr()
    assert "PASS" in captured.out
    assert "FAIL" not in captured.out
    assert captured.err == ""
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True


def test_verify_prints_json_alone(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(bundle.path), *FAST, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_a_changed_byte_is_a_verdict_that_names_the_file(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-1] ^= 1
    (folder / "model.onnx").write_bytes(content)
    assert run(["verify", str(folder), *FAST]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "model.onnx was changed" in printed
    assert "FAIL" in printed


def test_other_folders_than_bundles_and_unknown_runtimes_are_bad_usage(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert run(["verify", str(bundle.path), "--runtime", "tensorrt"]) == 2
    printed = capsys.readouterr().err
    assert all(spec.name in printed for spec in RUNNERS)


@pytest.mark.parametrize("name", [spec.name for spec in RUNNERS if spec.device == "cuda"])
def test_a_gpu_runtime_without_a_gpu_is_exit_3(bundle: Bundle, capfd: pytest.CaptureFixture[str], name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert run(["verify", str(bundle.path), "--runtime", name]) == 3
    captured = capfd.readouterr()
    assert captured.out == ""
    assert f"Error: {name} can't run here: " in captured.err
    assert len(captured.err.splitlines()) == 2


def test_the_code_of_a_users_network_makes_it_the_reference(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = reseal(copy_bundle(bundle, tmp_path / "1"), network={"source": "mine.py:net", "options": {}}).path
    (tmp_path / "mine.py").write_text("from bnexport.nn.lenet import bn_lenet\n\n\ndef net():\n    return bn_lenet()\n")
    arguments = ["verify", str(folder), "--runtime", "torch-cpu"]
    assert run(arguments) == 3
    assert "mine.py:net" in capsys.readouterr().err
    assert run([*arguments, "--source", f"{tmp_path / 'mine.py'}:net", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["reference"] == "the original module, in float64"


def test_doctor_fits_80_columns_and_states_each_cause_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = "no NVIDIA driver (libcuda.so.1: cannot open shared object file: No such file or directory)"
    remedy = (
        "Install an NVIDIA driver and pip install 'onnxruntime-gpu[cuda,cudnn]'; in a container, pass the GPU through"
    )
    rows = [
        Health("torch-cpu", True, "cpu", 1.5e-7, details={"engine": "torch eager", "version": "2.14.1+cu130"}),
        Health("onnxruntime-cuda", False, reason=loader, remedy=remedy),
        Health("onnxruntime-tensorrt", False, reason=loader, remedy=remedy),
    ]
    conflict = Conflict("torch for CUDA 12 and onnxruntime for CUDA 13 need different CUDA libraries " * 2, remedy)
    monkeypatch.setattr(doctor, "diagnose", lambda: Diagnosis(tuple(rows), environment(), (conflict,)))
    assert run(["doctor", "--require", "torch-cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 of 3 runtimes work on this machine."
    assert lines[1].split()[:2] == ["torch-cpu", "works"]
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).count("libcuda.so.1") == 1
    assert " ".join(" ".join(lines).split()).count(remedy) == 2, "once for the runtimes, once for the packages"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(spec.name in printed for spec in RUNNERS)
    assert "torch" in printed
    assert run(["doctor", "--json", "--require", "onnxruntime-cpu"]) == 0
    health = {row["runtime"]: row for row in json.loads(capsys.readouterr().out)["runtimes"]}
    assert health["onnxruntime-cpu"]["works"] is True
    if not health["onnxruntime-cuda"]["works"]:
        assert run(["doctor", "--require", "onnxruntime-cuda"]) == 3
    assert run(["doctor", "--require", "tensorrt"]) == 2


def test_the_verdict_as_a_page_and_for_ci(bundle: Bundle, tmp_path: Path) -> None:
    page, xml, value = tmp_path / "a.html", tmp_path / "a.xml", tmp_path / "a.json"
    options = shlex.split("--runtime onnxruntime-cpu --max-samples 40 --drift --io-binding --optimisation basic")
    files = ["--html", str(page), "--junit", str(xml), "--json", str(value)]
    assert run(["verify", str(bundle.path), *options, *files]) == 0
    text = page.read_text()
    assert "onnxruntime-cpu, IO binding, optimisation basic" in text
    assert "Predicted effect of each precision on this model" in text
    assert "layer by layer" in text
    assert f"bnexport verify {bundle.path}" in text
    assert b"<testsuite " in xml.read_bytes()
    report = json.loads(value.read_text())
    assert report["format"] == "bnexport-verification"
    assert {row["settings"] for row in report["rows"] if row["stage"] == "strict"} == {
        "optimisation basic",
        "IO binding, optimisation basic",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "tf32", "--runtime", "torch-cpu"], "torch-cpu has no tf32 kernels"),
        (["--samples", "nowhere.npy"], "nowhere.npy"),
    ],
)
def test_combinations_that_can_not_be_requested(
    bundle: Bundle, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(bundle.path), *options]) == 2
    assert words in capsys.readouterr().err


def test_the_users_own_samples(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", input=images, labels=rng.integers(0, 10, 30))
    options = ["--runtime", "onnxruntime-cpu", "--samples", str(tmp_path / "x.npz")]
    assert run(["verify", str(bundle.path), *options]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "30 images of x.npz, with labels" in out
    assert "labels right before" in out


@pytest.fixture
def few_faults(monkeypatch: pytest.MonkeyPatch) -> tuple[Fault, ...]:
    names = ("eps dropped", "another opset claimed", "other mean and deviation", "one flipped bit")
    kept = tuple(fault for fault in faults.FAULTS if fault.name in names)
    monkeypatch.setattr(faults, "FAULTS", kept)
    return kept


def test_the_self_test_is_shown_next_to_the_verdict(
    bundle: Bundle, few_faults: tuple[Fault, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, xml, value = tmp_path / "a.html", tmp_path / "a.xml", tmp_path / "a.json"
    files = ["--html", str(page), "--junit", str(xml), "--json", str(value)]
    assert run(["verify", str(bundle.path), *FAST, "--max-samples", "16", "--self-test", *files]) == 0
    captured = capsys.readouterr()
    count = len(few_faults) + len(bundle.manifest.files) + 1
    lines = captured.err.splitlines()
    assert lines[0] == f"self-test 1/{count}: eps dropped in model.onnx"
    assert lines[-1] == f"self-test {count}/{count}: one flipped bit in manifest.json"
    assert len(lines) == count
    assert f"self-test: {count} faults: 1 not tried here, {count - 1} caught" in captured.out
    assert "PASS" in captured.out
    found = {item["fault"]: item for item in json.loads(value.read_text())["findings"]["self_test"]}
    assert found["eps dropped"]["outcome"] == "caught"
    assert "file-proof" in found["eps dropped"]["caught"]
    assert found["eps dropped"]["where"].endswith(" in model.onnx")
    assert found["other mean and deviation"]["reason"].startswith("the bundle records no accuracy")
    assert "The self-test puts each fault into a copy of this bundle" in page.read_text()
    assert xml.read_text().count('classname="self-test"') == count


def test_a_fault_that_is_missed_is_exit_1(
    bundle: Bundle, few_faults: tuple[Fault, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle is right; a verifier that is blind where it should see proves nothing of it."""
    monkeypatch.setattr(stages, "declaration_problem", lambda *_: None)
    assert run(["verify", str(bundle.path), *FAST, "--max-samples", "16", "--self-test"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "MISSED another opset" in printed
    assert "manifest.json declaration nothing" in printed
    assert "FAIL: the self-test missed 1 faults, first another opset claimed in manifest.json" in printed


def test_the_page_shows_the_command_that_was_given(bundle: Bundle, tmp_path: Path) -> None:
    """Another command would verify on other inputs."""
    folder = tmp_path / "a b"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    np.save(samples := folder / "x.npy", images)
    options = ["--runtime", "onnxruntime-cpu", "--samples", str(samples), "--max-samples", "10", "--seed", "3"]
    assert run(["verify", str(bundle.path), *options, "--html", str(folder / "page.html")]) == 0
    text = html.unescape((folder / "page.html").read_text())
    requested = f"bnexport verify {bundle.path} --samples '{samples}' --max-samples 10"
    assert f"{requested} --runtime onnxruntime-cpu --seed 3" in text


def test_changed_labels_are_called_by_their_names(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    from bnexport.reporting.tables import make_console, print_verification
    from bnexport.verification.verdict import Findings, FlippedSample, VerificationReport

    flip = FlippedSample(7, 1, 0, 2, 0.001, 0.002, explained=True)
    report = VerificationReport((), findings=Findings(flipped={"x": (flip,)}))
    print_verification(report, make_console(), labels=("shoe", "bag", "coat"))
    assert "label changed, sample 7: shoe -> coat (true bag)" in capsys.readouterr().out


def test_progress_is_lines_in_a_log_and_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal in (False, True):
        monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda _, is_one=terminal: is_one))
        with counting("self-test") as show:
            show(1, 2, "one [bit]")
            show(2, 2, "NaN")
        captured = capsys.readouterr()
        assert captured.out == ""
        assert (captured.err == "self-test 1/2: one [bit]\nself-test 2/2: NaN\n") is not terminal
        assert ("self-test: NaN" in captured.err) is terminal
