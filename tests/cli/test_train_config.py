"""``bnexport train --config``, ``--tensorboard``, and a network of the user's own from training to export."""

import json
import sys

import pytest

from bnexport.cli.main import run
from bnexport.cli.train import command
from bnexport.data import digits
from bnexport.data.dataset_table import Dataset
from bnexport.loading.sources import load_source
from bnexport.training.optimisers import make_optimizer

NETWORK = """
from torch import nn

def build(width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 5, stride=3), nn.BatchNorm2d(width, eps=0.002), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 10)
    )
"""
#: A value of the right kind for each option, which is not its default.
VALUES = {
    "dataset": "digits", "data-dir": "d", "model": "net.py:build", "model-option": ["width=8"], "input": "1x28x28",
    "mean": [0.5], "std": "0.25", "norm": "torch", "epochs": 2, "lr": 0.125, "batch-size": 50, "optimizer": "adamw",
    "momentum": 0.0, "weight-decay": 0.5, "schedule": "cosine", "warmup-epochs": 0.5, "label-smoothing": 0.125,
    "amp": "bfloat16", "sync-batch-norm": True, "cuda-graph": False, "device": "cpu", "seed": 3, "recalibrate": False,
    "out": "o", "tensorboard": "t", "resume": False, "force": True,
}  # fmt: skip


def small_dataset(*_, **__):
    return Dataset("digits", *digits.draw(120, seed=1), *digits.draw(40, seed=2), tuple("0123456789"), "a test")


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    monkeypatch.setattr("bnexport.training.preparation.load_dataset", small_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)


def toml(values):
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def test_every_option_may_stand_in_the_file(tmp_path):
    options = {p.opts[0].removeprefix("--") for p in command.params if p.expose_value}
    assert set(VALUES) == options
    for text in (toml(VALUES), "[train]\n" + toml(VALUES), toml({k.replace("-", "_"): v for k, v in VALUES.items()})):
        (tmp_path / "c.toml").write_text(text)
        assert run(["train", "--config", "c.toml"]) == 0
        config = json.loads((tmp_path / "o" / "config.json").read_text())
        expected = {"lr": 0.125, "epochs": 2, "mean": [0.5], "std": [0.25], "model_options": {"width": 8}, "seed": 3}
        assert expected.items() <= config.items()
        assert config["sync_batch_norm"] is True
        assert config["cuda_graph"] is False
        assert config["recalibrate"] is False


def test_the_command_line_wins_and_a_resumed_run_takes_the_file_too(tmp_path, capsys):
    (tmp_path / "c.toml").write_text('[train]\ndataset = "digits"\nlr = 0.5\nepochs = 1\nbatch-size = 60\n')
    assert run(["train", "--config", "c.toml", "--lr", "0.25", "--out", "a"]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["lr"], config["epochs"], config["batch_size"]) == (0.25, 1, 60)
    assert run(["train", "--config", "c.toml", "--out", "a", "--resume"]) == 2
    assert "started with lr 0.25, so it can't be resumed with lr 0.5" in capsys.readouterr().err
    (tmp_path / "more.toml").write_text("epochs = 2\nresume = true\n")
    assert run(["train", "--config", "more.toml", "--out", "a"]) == 0
    assert "resuming after epoch 1" in capsys.readouterr().out


def test_a_whole_number_is_a_number(tmp_path, monkeypatch):
    """An integer learning rate would be an integer tensor on a GPU, in which a schedule's values become 0."""
    (tmp_path / "c.toml").write_text('dataset = "digits"\nlr = 1\nepochs = 1\nmean = [0]\nweight-decay = 0\n')
    rates = []
    monkeypatch.setattr(
        "bnexport.training.preparation.make_optimizer",
        lambda *words: rates.append(words[1].lr) or make_optimizer(*words),
    )
    assert run(["train", "--config", "c.toml", "--device", "cpu", "--out", "a"]) == 0
    assert [type(rate) for rate in rates] == [float]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert [type(value) for value in (config["lr"], config["weight_decay"], *config["mean"])] == [float] * 3


def test_a_table_of_model_options(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[train]\nmodel = "net.py:build"\ndataset = "digits"\nepochs = 1\n[train.model-option]\nwidth = 6\n'
    )
    assert run(["train", "--config", "c.toml", "--out", "a"]) == 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_options"] == {"width": 6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rate = 1", "the option 'learning-rate', which is unknown"),
        ("config = 'x'", "the option 'config', which is unknown"),
        ("lr = 2020-01-01", "lr is datetime.date(2020, 1, 1)"),
        ("lr = true", "lr is True"),
        ("lr = [1.0]", "lr is [1.0]"),
        ("epochs = 2.5", "epochs is 2.5"),
        ("epochs = {a = 1}", "epochs is {'a': 1}"),
        ("resume = 1", "resume is 1"),
        ("cuda-graph = 'on'", "cuda-graph is 'on'"),
        ("optimizer = 5", "'5' is not one of"),
        ("lr = 1\n[train]\nepochs = 1", "has 'lr' outside of its table [train]"),
        ("lr = ", "can't be read"),
        ("lr = nan", "the learning rate is nan"),
    ],
)
def test_errors_in_the_file(tmp_path, capsys, text, message):
    (tmp_path / "c.toml").write_text(text)
    assert run(["train", "--config", "c.toml", "--out", "a"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "a").exists()


def test_a_file_that_is_not_there(capsys):
    assert run(["train", "--config", "none.toml"]) == 2
    assert "none.toml can't be read" in capsys.readouterr().err


FAST = ["train", "--dataset", "digits", "--device", "cpu", "--batch-size", "60", "--lr", "0.1"]


def test_tensorboard_holds_the_numbers_of_the_epochs(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run([*FAST, "--epochs", "2", "--out", "a", "--tensorboard", "events"]) == 0
    assert run([*FAST, "--epochs", "3", "--out", "a", "--tensorboard", "events", "--resume"]) == 0
    found = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    for tag, name in {
        "loss/train": "train_loss",
        "accuracy/test": "test_accuracy",
        "learning_rate": "learning_rate",
    }.items():
        assert [event.step for event in found.Scalars(tag)] == [1, 2, 3]
        assert [event.value for event in found.Scalars(tag)] == pytest.approx([row[name] for row in rows], rel=1e-6)


def test_a_refused_run_leaves_no_events(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert run([*FAST, "--out", "a", "--tensorboard", "events"]) == 2
    assert not (tmp_path / "events").exists()


def test_without_tensorboard(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run([*FAST, "--out", "a", "--tensorboard", "events"]) == 3
    assert "bnexport[tensorboard]" in capsys.readouterr().err


def test_a_network_of_ones_own_is_exported_by_its_code_and_its_checkpoint(tmp_path, capsys):
    own = ["--model", "net.py:build", "--model-option", "width=8"]
    assert run([*FAST, *own, "--epochs", "2", "--out", "a"]) == 0
    capsys.readouterr()
    assert run(["fold-and-export", "a", "--out", "m/net/1"]) == 2
    words = "Name its code and these weights: net.py:build --weights a/model.safetensors"
    assert words in capsys.readouterr().err
    loaded = load_source("net.py:build", weights=tmp_path / "a" / "model.safetensors")
    assert (loaded.input_shape, loaded.labels, loaded.dataset) == ((1, 28, 28), tuple("0123456789"), "digits")
    assert loaded.network["options"] == {"width": 8}
    code = run(["fold-and-export", *words.split(": ")[1].split(), "--out", "m/net/1"])
    assert code == 0, capsys.readouterr().err
    manifest = json.loads((tmp_path / "m" / "net" / "1" / "manifest.json").read_text())
    assert manifest["labels"] == list("0123456789")
    for path in ("a", "m/net/1"):
        capsys.readouterr()
        assert run(["inspect", path]) == 0
        shown = capsys.readouterr().out
        assert "0.002" in shown, "the eps of the network, by which the fold divides"
        assert "assumed" not in shown


def test_the_checkpoint_of_another_network_sets_no_defaults(tmp_path):
    assert run([*FAST, "--model", "net.py:build", "--epochs", "1", "--out", "a"]) == 0
    (tmp_path / "other.py").write_text(NETWORK)
    loaded = load_source("other.py:build", weights=tmp_path / "a" / "model.safetensors")
    assert loaded.labels is loaded.input_shape is None
