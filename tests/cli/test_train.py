import json

import click.testing
import pytest

from bnexport.cli.main import run
from bnexport.cli.train import command
from bnexport.data import digits
from bnexport.data.dataset_table import DATASETS, Dataset
from bnexport.errors import NetworkError
from bnexport.nn.lenet import NORMS
from bnexport.training.config import AMP, DEVICES, OPTIMIZERS, SCHEDULES, TrainingConfig

FAST = ["train", "--dataset", "digits", "--device", "cpu", "--batch-size", "64", "--lr", "0.5"]


def small_dataset(name="digits", progress=None, **_):
    if progress is not None:
        progress("train.gz", 500_000, 1_000_000)
        progress("train.gz", 1_000_000, 1_000_000)
    return Dataset("digits", *digits.draw(200, seed=1), *digits.draw(50, seed=2), tuple("0123456789"), "a test")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("bnexport.training.preparation.load_dataset", small_dataset)


def test_a_run_and_its_resumption(tmp_path, capsys):
    out = tmp_path / "a"
    assert run([*FAST, "--epochs", "2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "downloading train.gz (1.0 MB)"
    assert lines[1] == "digits: a test"
    assert lines[2] == "BN-LeNet, norm torch, 2 epochs, sgd, lr 0.5, batch 64, seed 0, on cpu"
    assert lines.pop(5).startswith("note: the moving statistics are stale on 192 training images")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line, row in zip(lines[3:5], rows, strict=True):
        assert line == (
            f"epoch {row['epoch']}/2  loss {row['train_loss']:.3f}  train acc {row['train_accuracy']:.3f}  "
            f"test acc {row['test_accuracy']:.3f}  {row['examples_per_s']:.0f} examples/s"
        )
    assert lines[5].startswith("gamma of the first BatchNorm: ")
    assert len(lines[6].removeprefix("beta of the first BatchNorm:").split()) == 6
    assert "moving statistics of training" in lines[7]
    assert "whole training set" in lines[8]
    names = ["model.safetensors", "checkpoint.safetensors", "learning_curves.png"]
    assert lines[9:] == [f"written: {out / name}" for name in names]
    assert (out / "learning_curves.png").read_bytes().startswith(b"\x89PNG")

    assert run(["train", "--out", str(out), "--resume", "--epochs", "3"]) == 0
    text = capsys.readouterr().out
    assert "resuming after epoch 2" in text
    assert "lr 0.5, batch 64" in text
    assert "epoch 3/3" in text
    assert run(["train", "--out", str(out), "--resume"]) == 0
    assert "all 3 epochs are done already" in capsys.readouterr().out


def test_a_network_without_batch_norm(tmp_path, capsys):
    assert run([*FAST, "--norm", "none", "--epochs", "1", "--out", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "no BatchNorm" in text
    assert "\ntest accuracy: " in text
    assert text.isascii()


def test_no_recalibration(tmp_path, capsys):
    assert run([*FAST, "--no-recalibrate", "--epochs", "1", "--out", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "gamma" in text
    assert "whole training set" not in text


def refused(capsys, code, *arguments):
    assert run([*FAST, *arguments]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_refusals(tmp_path, capsys, monkeypatch):
    out = tmp_path / "a"
    assert run([*FAST, "--epochs", "1", "--out", str(out)]) == 0
    capsys.readouterr()
    assert "has a run already" in refused(capsys, 2, "--out", str(out))
    assert "can't be resumed with seed 5" in refused(capsys, 2, "--out", str(out), "--resume", "--seed", "5")
    assert "epochs is 0" in refused(capsys, 2, "--epochs", "0")
    assert "learning rate is -1.0" in refused(capsys, 2, "--lr", "-1")
    assert "'layer' is not one of" in refused(capsys, 2, "--norm", "layer")
    assert "diverged" in refused(capsys, 2, "--lr", "1e38", "--norm", "none", "--out", str(tmp_path / "b"))
    (out / "checkpoint.safetensors").write_text("not a checkpoint")
    assert "not a complete safetensors file" in refused(capsys, 2, "--out", str(out), "--resume")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA device" in refused(capsys, 3, "--device", "cuda", "--out", str(tmp_path / "c"))

    def no_network(*_, **__):
        raise NetworkError("x.gz could not be downloaded", remedy="Use --dataset digits")

    monkeypatch.setattr("bnexport.training.preparation.load_dataset", no_network)
    assert "could not be downloaded" in refused(capsys, 3, "--out", str(tmp_path / "d"))
    assert run([*FAST, "--out", str(out), "--force"]) == 3
    assert (out / "model.safetensors").exists()


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path, capsys, monkeypatch):
    def interrupt(self, metrics):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bnexport.cli.training_display.TrainingDisplay.on_epoch", interrupt)
        assert run([*FAST, "--epochs", "2", "--out", str(tmp_path / "a")]) == 130
    assert run(["train", "--out", str(tmp_path / "a"), "--resume"]) == 0
    assert "resuming after epoch 1" in capsys.readouterr().out


def test_a_terminal_shows_a_bar(tmp_path, monkeypatch):
    import io

    from rich.console import Console

    from bnexport.cli.training_display import TrainingDisplay
    from bnexport.training.training_run import train

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, highlight=False, markup=False)
    config = TrainingConfig(dataset="digits", epochs=1, batch_size=64, device="cpu")
    with TrainingDisplay(console) as display:
        train(config, out=tmp_path / "a", progress=display)
    assert "4/4" in stream.getvalue()
    assert "epoch 1/1  loss" in stream.getvalue()


def test_help_shows_the_tables_and_the_defaults():
    text = click.testing.CliRunner().invoke(command, ["--help"], terminal_width=200).output
    for choices in (NORMS, DEVICES, OPTIMIZERS, SCHEDULES, AMP):
        assert "|".join(choices) in text
    assert f"[{'|'.join(DATASETS)}|folder:PATH]" in "".join(text.split())
    for default in ("fashion-mnist", "torch", "10", "1.0", "256", "auto", "runs/bn_lenet"):
        assert f"[default: {default}" in text
