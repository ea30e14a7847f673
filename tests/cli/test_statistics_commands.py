"""recalibrate, evaluate and inspect --statistics: what they print and write, and what they refuse."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import randomise
from PIL import Image
from safetensors.torch import save_file
from support.bundles import reseal

from bnexport.cli.main import run
from bnexport.data import digits
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import NetworkError
from bnexport.loading.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bnexport.nn.lenet import bn_lenet

REFERENCE = Path(__file__).parents[2] / "models" / "bn_lenet" / "1"
TRAIN, TEST = digits.draw(200, seed=1), digits.draw(60, seed=2)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bnexport.data.digits.training_set", lambda: TRAIN)
    monkeypatch.setattr("bnexport.data.digits.test_set", lambda: TEST)
    monkeypatch.delenv("BNEXPORT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")

    def offline(*_: object, **__: object) -> None:
        raise NetworkError(
            "train-images could not be downloaded", remedy="Put the files into DIR and pass --data-dir DIR"
        )

    monkeypatch.setattr("bnexport.data.locate.download_file", offline)


def write(path: Path, *, classes: int = 10, dataset: str | None = "digits") -> Path:
    torch.manual_seed(0)
    metadata = {
        "network": {"source": "bn_lenet", "options": {"norm": "torch", "in_channels": 1, "num_classes": classes}},
        "dataset": dataset,
        "labels": None,
        "preprocessing": Preprocessing().to_json(),
        "training": {},
        "recalibrated": False,
    }
    save_checkpoint(path, Checkpoint(randomise(bn_lenet(num_classes=classes)).state_dict(), metadata))
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "model.safetensors")


def test_recalibrate(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["recalibrate", str(checkpoint), "--device", "cpu"]) == 0
    out, err = capfd.readouterr()
    written = checkpoint.with_name("model.recalibrated.safetensors")
    for words in (
        "re-estimated over 200 training images of digits, batches of 256; definition: batch",
        "test accuracy before: ",
        "test accuracy after:  ",
        f"written: {written}",
        "stale",
        "numpy ",
    ):
        assert words in out, words
    assert err == "re-estimating: 200 images\n", "a log has one plain line"
    table = [line for line in out.splitlines() if line.lstrip().startswith("bn")]
    assert [line.split()[0] for line in table] == ["bn1", "bn2", "bn3", "bn4"]
    assert max(map(len, table)) <= 80
    assert load_checkpoint(written).metadata["recalibration"]["definition"] == "batch"
    assert run(["inspect", str(written), "--statistics"]) == 0
    assert "the moving statistics are up to date on 200 training images" in " ".join(capfd.readouterr().out.split())


def test_recalibrate_by_layer_as_json(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--definition", "population", "--samples", "90", "--out", str(tmp_path / "new.safetensors"), "--json"]
    assert run(["recalibrate", str(checkpoint), *words]) == 0
    out, err = capfd.readouterr()
    value = json.loads(out)
    assert value["recalibration"]["images"] == 90
    assert value["before"]["n"] == value["after"]["n"] == 60
    assert value["distance"]["stale"] is True
    assert err == "re-estimating: 360 images\n", "one pass per layer"


def test_inspect_begins_with_a_summary_and_lists_channels_on_request(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(checkpoint)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "4 BatchNorm layers with 226 channels: " in lines[0]
    assert "?" not in lines[0]
    assert any(line.startswith("in ") for line in lines[1:3])
    layers = [line.split()[:2] for line in lines if line.strip().startswith("bn") and "1e-05" in line]
    assert layers == [["bn1", "6"], ["bn2", "16"], ["bn3", "120"], ["bn4", "84"]]
    assert len(lines) < 25
    assert max(map(len, lines[1:])) <= 80
    assert run(["inspect", str(checkpoint), "--all"]) == 0
    every = capfd.readouterr().out.splitlines()
    assert every[: len(lines) - 1] == lines[:-1], "the summary comes first"
    assert len(every) > 226


def test_inspect_shows_stale_statistics(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(checkpoint)]) == 0
    assert "mean off" not in capfd.readouterr().out
    assert run(["inspect", str(checkpoint), "--statistics", "--json"]) == 0
    value = json.loads(capfd.readouterr().out)
    assert value["staleness"]["images"] == 200
    assert [layer["name"] for layer in value["staleness"]["layers"]] == ["bn1", "bn2", "bn3", "bn4"]
    assert run(["inspect", str(checkpoint), "--statistics"]) == 0
    assert "bnexport recalibrate" in capfd.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--dataset", "digits", "--epochs", "1", "--out", "RUN"),
        ("evaluate", "FILE", "--dataset", "digits"),
        ("evaluate", "FILE"),
        ("recalibrate", "FILE", "--out", "RUN"),
        ("inspect", "FILE"),
    ],
)
def test_a_folder_for_embedded_images_is_refused(
    checkpoint: Path, tmp_path: Path, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [{"FILE": str(checkpoint), "RUN": str(out)}.get(word, word) for word in words]
    assert run([*given, "--data-dir", str(tmp_path)]) == 2
    assert "the images of digits are part of bnexport.\nLeave --data-dir out" in capfd.readouterr().err
    assert not out.exists()


def test_evaluate(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture, report = tmp_path / "a" / "confusion.png", tmp_path / "report.json"
    assert run(["evaluate", str(checkpoint), "--confusion", str(picture), "--json", str(report)]) == 0
    out, err = capfd.readouterr()
    value = json.loads(report.read_text())
    assert sum(map(sum, value["confusion"])) == value["n"] == 60
    assert f"accuracy {value['accuracy']:.4f} (95 % Wilson interval" in out
    assert f"written: {picture}" in out
    assert f"written: {report}" in out
    with Image.open(picture) as image:
        assert image.width > 400
    assert err == "evaluating: 60 images\n"
    assert run(["evaluate", str(checkpoint), "--json", "-"]) == 0
    assert json.loads(capfd.readouterr().out)["correct"] == value["correct"]


def test_evaluate_a_bundle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(REFERENCE, tmp_path / "1")
    reseal(tmp_path / "1", labels=None)
    assert run(["evaluate", str(tmp_path / "1"), "--dataset", "digits", "--batch-size", "7"]) == 0
    out = capfd.readouterr().out
    assert "60 test images of digits, onnxruntime-cpu" in out
    assert "WARNING: the network was trained on fashion-mnist" in out
    message = "the classes of digits differ; first difference at class 0: 't-shirt' and '0'"
    assert message in refused(capfd, 2, "evaluate", REFERENCE, "--dataset", "digits")


def refused(capfd: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    assert run([str(word) for word in words]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("command", ["evaluate", "recalibrate", "inspect"])
def test_files_that_are_not_checkpoints(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.safetensors").write_text("this is a text file, not a checkpoint\n" * 9)
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refused(capfd, 2, command, tmp_path / "missing.safetensors")
    assert "not a complete safetensors file" in refused(capfd, 2, command, tmp_path / "text.safetensors")
    assert "holds no model.safetensors" in refused(capfd, 2, command, tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((REFERENCE / "model.onnx").read_bytes(), "is an ONNX model"),
        (
            b'{"weight_map": {"bn.weight": "a.safetensors"}}',
            "is the index of weights in several files, which is inspected",
        ),
    ],
    ids=["onnx", "index"],
)
def test_inspect_names_the_kind_of_other_files(
    content: bytes, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(content)
    message = " ".join(refused(capfd, 2, "inspect", tmp_path / "file").split())
    assert words in message
    assert "not a complete safetensors file" not in message
    assert "--weights" not in message, "inspect has no such option"


@pytest.mark.parametrize("words", [("evaluate",), ("recalibrate",), ("inspect", "--statistics")])
def test_weights_without_a_network(words: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file(randomise(bn_lenet()).state_dict(), tmp_path / "plain.safetensors")
    message = refused(capfd, 2, *words, tmp_path / "plain.safetensors")
    assert "its network is unknown" in message
    assert "--source" in message


@pytest.mark.parametrize("command", ["evaluate", "recalibrate"])
def test_data_that_do_not_fit_or_are_not_here(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, odd = write(tmp_path / "good.safetensors"), write(tmp_path / "odd.safetensors", classes=7)
    unnamed = write(tmp_path / "unnamed.safetensors", dataset=None)
    assert "returns 7 scores, but the data set has 10 classes" in refused(capfd, 2, command, odd)
    assert "pass --dataset" in refused(capfd, 2, command, unnamed).lower()
    assert "'imagenet' is not one of" in refused(capfd, 2, command, good, "--dataset", "imagenet")
    message = refused(capfd, 3, command, good, "--dataset", "mnist")
    assert "could not be downloaded" in message
    assert "--data-dir" in message
    assert sorted(path.name for path in tmp_path.glob("*recalibrated*")) == []


def test_outputs_that_can_not_be(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = checkpoint.read_bytes()
    assert "is the checkpoint that is read" in refused(
        capfd, 2, "recalibrate", checkpoint, "--out", checkpoint, "--force"
    )
    assert checkpoint.read_bytes() == before
    shutil.copy(checkpoint, tmp_path / "model.recalibrated.safetensors")
    assert "--force" in refused(capfd, 2, "recalibrate", checkpoint)
    assert "neither a .png nor a .svg" in refused(capfd, 2, "evaluate", checkpoint, "--confusion", tmp_path / "a.gif")


def test_options_that_can_not_be(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (
        ("recalibrate", checkpoint, "--samples", "0"),
        ("recalibrate", checkpoint, "--batch-size", "0"),
        ("recalibrate", checkpoint, "--batch-size", "1"),
        ("recalibrate", checkpoint, "--definition", "best"),
        ("evaluate", checkpoint, "--batch-size", "0"),
        ("evaluate", checkpoint, "--runtime", "onnxruntime-cpu"),
        ("evaluate", REFERENCE, "--device", "cpu"),
        ("evaluate", REFERENCE, "--runtime", "abacus"),
    ):
        assert refused(capfd, 2, *words) != ""


def test_no_gpu(checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in ("recalibrate", "evaluate"):
        assert "no CUDA device" in refused(capfd, 3, command, checkpoint, "--device", "cuda")


def test_an_interrupt_leaves_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("bnexport.evaluating.recalibration.recalibrate", interrupted)
    assert run(["recalibrate", str(checkpoint)]) == 130
    assert [path.name for path in checkpoint.parent.glob("*.safetensors")] == ["model.safetensors"]


def test_an_ascii_terminal(checkpoint: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "80"}
    code = "import sys; from bnexport.cli.main import run; print('both', run(['evaluate', sys.argv[-2]]), run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "inspect", str(checkpoint), "--statistics"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1] == "both 0 0", done.stderr
    assert done.stdout.isascii()


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from bnexport.cli.main import run\n"
        "for name in ('recalibrate', 'evaluate', 'inspect'):\n"
        "    assert run([name, '--help']) == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=120)
