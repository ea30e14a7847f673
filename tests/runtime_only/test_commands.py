"""Every command with only numpy, onnxruntime, click and rich: it works, or its error names the missing package."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from runtime_only.absence import REFERENCE, WITH_ONNX
from runtime_only.conftest import Run
from support.bundles import flip_bit, reseal

from bnexport.bundle import GOLDEN, MODEL_ONNX, Bundle, seal
from bnexport.cli.main import COMMANDS
from bnexport.cli.verify import command as verify

LEFT_OUT = "the float64 proof was not repeated here"


def report_of(result: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(result["out"])
    return report


def text_of(result: dict[str, Any]) -> str:
    """Return the printed text on one line."""
    return " ".join((result["out"] + result["err"]).split())


def test_help_needs_nothing(without: Run) -> None:
    commands = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    for words, result in zip(commands, without(commands), strict=True):
        assert result["code"] == 0, (words, result["err"])


def test_verify_passes_and_states_what_it_did_not_cover(without: Run) -> None:
    shown, raw = without([["verify", str(REFERENCE)], ["verify", str(REFERENCE), "--json", "-"]])
    assert shown["code"] == 0, text_of(shown)
    assert f"PASS, files and golden vectors only: {len(report_of(raw)['rows'])} comparisons on " in text_of(shown)
    proofs = [row for row in Bundle.open(REFERENCE).manifest.verification["rows"] if row["stage"] == "file-proof"]
    worst = max(row["error"] for row in proofs if row["subject"] == MODEL_ONNX)
    assert f"at export it was {worst:.1e} of scale" in text_of(shown)
    assert "torch is not installed" in text_of(shown)
    assert "the bundle's golden vectors, not the original network, which needs torch" in text_of(shown)
    report = report_of(raw)
    assert raw["code"] == 0
    assert report["passed"] is True
    assert list(report["findings"]["waived"]) == ["file-proof"]
    stages = {(row["stage"], row["subject"]) for row in report["rows"]}
    session = {(stage, "onnxruntime-cpu") for stage in ("golden", "strict", "batch-size", "repeat")}
    assert session | {("integrity", MODEL_ONNX)} <= stages
    assert not [row for row in report["rows"] if row["stage"] == "file-proof"]
    assert {row["case"] for row in report["rows"] if row["stage"] == "batch-size"} >= {"batch 1 of 16", "batch 7 of 16"}


def test_where_onnx_is_there_the_proof_is_repeated(without: Run) -> None:
    (raw,) = without([["verify", str(REFERENCE), "--json", "-"]], WITH_ONNX)
    report = report_of(raw)
    assert report["passed"] is True, report["summary"]
    assert report["findings"]["waived"] == {}
    (proof,) = [row for row in report["rows"] if (row["stage"], row["subject"]) == ("file-proof", MODEL_ONNX)]
    assert proof["error"] < 1e-6
    assert LEFT_OUT not in report["summary"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(REFERENCE, tmp_path / "bn_lenet" / "1")
    return tmp_path / "bn_lenet" / "1"


def wrong_weight(folder: Path) -> None:
    """Change one bias in a bundle whose hashes hold: only its outputs show it."""
    model = onnx.load(folder / MODEL_ONNX)
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [10])
    array = numpy_helper.to_array(bias).copy()
    array[3] += np.abs(array).max() * 1e-2 + 1e-2
    bias.CopyFrom(numpy_helper.from_array(array, bias.name))
    (folder / MODEL_ONNX).write_bytes(model.SerializeToString())
    seal(folder, Bundle.open(folder).manifest)


def manifest_of(folder: Path, change: Any) -> None:
    """Change the record of the verification at export, with a digest that holds."""
    manifest = Bundle.open(folder).manifest
    value = json.loads(json.dumps(dict(manifest.verification)))
    change(value)
    seal(folder, type(manifest)(**{**vars(manifest), "verification": value}))


def worse_proof(value: dict[str, Any]) -> None:
    for row in value["rows"]:
        if row["stage"] == "file-proof":
            row["error"] = 1e-4


SPOILED: dict[str, tuple[Any, str]] = {
    "a bit of the model": (lambda folder: flip_bit(folder / MODEL_ONNX), "model.onnx was changed"),
    "a bit of the weights": (
        lambda folder: flip_bit(folder / "weights.safetensors"),
        "weights.safetensors was changed",
    ),
    "a bit of a golden output": (lambda folder: flip_bit(folder / GOLDEN / "output_0.pb"), "output_0.pb was changed"),
    "a file more": (lambda folder: (folder / "x").write_text("x"), "x is not in the manifest"),
    "a wrong weight": (wrong_weight, "above 1e-05"),
    "never proved": (lambda folder: manifest_of(folder, dict.clear), "no proof from export"),
    "proved badly": (lambda folder: manifest_of(folder, worse_proof), "no proof from export"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_bundle_fails(without: Run, copy: Path, name: str) -> None:
    change, words = SPOILED[name]
    change(copy)
    (result,) = without([["verify", str(copy)]])
    assert result["code"] == 1, text_of(result)
    assert words in text_of(result)
    assert "FAIL:" in text_of(result)


def test_deploy_for_triton(without: Run, tmp_path: Path) -> None:
    """The check of config.pbtxt needs protobuf, which comes with onnxruntime; KServe's YAML needs an extra, which is named."""
    kserve = ["--out", str(tmp_path / "kserve"), "--name", "bn-lenet", "--storage-uri", "s3://bucket/models"]
    written, built, refused = without(
        [
            ["deploy", "triton", str(REFERENCE), "--out", str(tmp_path / "repository")],
            ["deploy", "docker", str(REFERENCE), "--out", str(tmp_path / "docker")],
            ["deploy", "kserve", str(REFERENCE), *kserve],
        ]
    )
    assert written["code"] == 0, text_of(written)
    assert (tmp_path / "repository" / "bn_lenet" / "config.pbtxt").is_file()
    assert built["code"] == 0, text_of(built)
    assert (tmp_path / "docker" / "Dockerfile").is_file()
    assert refused["code"] == 3
    assert "bnexport-runtime[deploy]" in text_of(refused)


def test_predict_inspect_and_doctor(without: Run, files: Path) -> None:
    predicted, listed, doctor, required = without(
        [
            ["predict", str(REFERENCE), str(files / "pixels.npy"), "--json"],
            ["inspect", str(REFERENCE), "--json"],
            ["doctor", "--json"],
            ["doctor", "--require", "onnxruntime-cpu"],
        ]
    )
    assert (predicted["code"], listed["code"], required["code"]) == (0, 0, 0)
    assert len(predicted["out"].splitlines()) == 3
    inspected = json.loads(listed["out"])
    assert [layer["name"] for layer in inspected["layers"]] == ["bn1", "bn2", "bn3", "bn4"]
    assert "eps" in inspected["note"]
    health = {row["runtime"]: row for row in json.loads(doctor["out"])["runtimes"]}
    assert health["onnxruntime-cpu"]["works"]
    for name in ("torch-cpu", "torchscript-cpu"):
        assert health[name]["reason"] == "torch is not installed"
        assert health[name]["remedy"] == "Install it: pip install torch"
    assert doctor["code"] == 3, "from a checkout the whole tool is expected"


def test_evaluate_counts_with_onnxruntime_alone(without: Run, tmp_path: Path) -> None:
    shutil.copytree(REFERENCE, tmp_path / "1")
    reseal(tmp_path / "1", labels=None)
    (result,) = without([["evaluate", str(tmp_path / "1"), "--dataset", "digits", "--json", "-"]])
    assert result["code"] == 0, text_of(result)
    report = report_of(result)
    assert report["n"] == sum(map(sum, report["confusion"])) == 1000


def offered(words: list[str]) -> bool:
    """Return True if a command line names only existing options."""
    options = {option for parameter in verify.params for option in parameter.opts}
    return words[0] != "verify" or {word for word in words if word.startswith("--")} <= options


NEEDS: dict[str, tuple[list[str], str]] = {
    "train": (["train", "--dataset", "digits"], "bnexport train needs torch"),
    "fold a network": (["fold-and-export", "torchvision:resnet18"], "bnexport fold-and-export needs torch"),
    "fold a file": (["fold-and-export", str(REFERENCE / MODEL_ONNX)], "bnexport fold-and-export needs torch"),
    "recalibrate": (["recalibrate", "model.safetensors"], "bnexport recalibrate needs torch"),
    "evaluate a network": (["evaluate", "model.safetensors"], "evaluating a checkpoint needs torch"),
    "confusion": (["evaluate", str(REFERENCE), "--confusion", "a.png"], "--confusion needs matplotlib"),
    "statistics": (["inspect", str(REFERENCE), "--statistics"], "bnexport inspect --statistics needs torch"),
    "audit": (["audit", "torchvision:resnet18"], "bnexport audit needs torch"),
    "self-test": (["verify", str(REFERENCE), "--self-test"], "needs torch"),
    "page": (["verify", str(REFERENCE), "--html", "OUT"], "needs jinja2"),
    "source": (["verify", str(REFERENCE), "--source", "net.py:make"], "needs torch"),
    "samples": (["verify", str(REFERENCE), "--samples", "FILES/floats.npy"], "needs torch"),
    "torch runtime": (["verify", str(REFERENCE), "--runtime", "torch-cpu"], "torch is not installed"),
    "torchscript": (["predict", str(REFERENCE), "FILES/pixels.npy", "--runtime", "torchscript-cpu"], "torch"),
    "serve": (["serve", str(REFERENCE), "--port", "0"], "needs uvicorn"),
    "a picture": (["predict", str(REFERENCE), "FILES/picture.png"], "needs PIL"),
    "another size": (["predict", str(REFERENCE), "FILES/large.npy"], "fitting images to the model's size needs PIL"),
}


def test_commands_that_need_more_end_with_3_and_name_what_to_install(without: Run, files: Path, tmp_path: Path) -> None:
    commands, needs = [], {name: row for name, row in NEEDS.items() if offered(row[0])}
    for name, (words, _) in needs.items():
        words = [word.replace("FILES", str(files)).replace("OUT", str(tmp_path / "page.html")) for word in words]
        commands.append([*words, "--out", str(tmp_path / name)] if words[0] in ("train", "fold-and-export") else words)
    for (name, (_, printed)), result in zip(needs.items(), without(commands), strict=True):
        assert result["code"] == 3, (name, text_of(result))
        assert printed in result["err"], (name, result["err"])
        assert len(result["err"].splitlines()) == 2, (name, result["err"])
    assert list(tmp_path.iterdir()) == []


def test_reports_for_programs_need_nothing_more(without: Run, tmp_path: Path) -> None:
    words = ["verify", str(REFERENCE), "--junit", str(tmp_path / "report.xml")]
    if not offered(words):
        pytest.skip("verify writes no JUnit report")
    (result,) = without([words])
    assert result["code"] == 0
    assert LEFT_OUT in (tmp_path / "report.xml").read_text()
