import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from bnexport.data import digits
from bnexport.data.dataset_table import Dataset
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import OutputError
from bnexport.loading.checkpoint import load_checkpoint
from bnexport.nn.lenet import NORMS, bn_lenet
from bnexport.training.config import TrainingConfig
from bnexport.training.listeners import TrainingListener
from bnexport.training.training_run import train

CONFIG = TrainingConfig(dataset="digits", epochs=3, batch_size=64, lr=0.5, device="cpu", seed=3)


def small_dataset(name="digits", **_):
    """330 drawings for training: five batches of 64 and one of 10."""
    train_part, test_part = digits.draw(330, seed=1), digits.draw(100, seed=2)
    return Dataset("digits", *train_part, *test_part, tuple("0123456789"), "a test")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("bnexport.training.preparation.load_dataset", small_dataset)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of CONFIG without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnexport.training.preparation.load_dataset", small_dataset)
        return train(CONFIG, out=tmp_path_factory.mktemp("whole"))


def same(one, other):
    first, second = load_checkpoint(one), load_checkpoint(other)
    assert set(first.state) == set(second.state)
    return all(torch.equal(value, second.state[name]) for name, value in first.state.items())


class Stopped(Exception):
    pass


class StopAt(TrainingListener):
    """Leaves the run in the middle of an epoch."""

    def __init__(self, epoch, batch=3):
        self.epoch, self.batch, self.now = epoch, batch, 0

    def on_start(self, config, device, origin, first_epoch):
        self.now = first_epoch

    def on_batch(self, done, total):
        assert total == 6
        if (self.now, done) == (self.epoch, self.batch):
            raise Stopped

    def on_epoch(self, metrics):
        self.now += 1


# --- what a run writes


@pytest.mark.parametrize("norm", NORMS)
def test_the_run_directory(tmp_path, norm):
    out = tmp_path / "runs" / "a"
    config = replace(CONFIG, norm=norm, epochs=2)
    result = train(config, out=out)
    names = {"checkpoint.safetensors", "config.json", "metrics.jsonl", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {".run.lock"}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert set(rows[0]) == {
        "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate", "examples_per_s"
    }  # fmt: skip
    assert rows == list(result.history)
    assert TrainingConfig.from_json(json.loads((out / "config.json").read_text())) == config
    metadata = load_checkpoint(result.model).metadata
    assert metadata["network"] == {"source": "bn_lenet", "options": {"norm": norm, "in_channels": 1, "num_classes": 10}}
    assert metadata["dataset"] == "digits"
    assert metadata["labels"] == list("0123456789")
    assert Preprocessing.from_json(metadata["preprocessing"]) == Preprocessing()
    training = metadata["training"]
    assert (training["epoch"], training["epochs"], training["history"]) == (2, 2, rows)
    assert metadata["recalibrated"] is (norm != "none")
    assert load_checkpoint(result.checkpoint).metadata["recalibrated"] is False
    if norm == "none":
        assert result.gamma is result.beta is result.recalibrated_accuracy is None
    else:
        assert len(result.gamma) == len(result.beta) == 6
        assert training["test_accuracy"] == {
            "moving": result.test_accuracy,
            "recalibrated": result.recalibrated_accuracy,
        }


def accuracy_of(file):
    checkpoint = load_checkpoint(file)
    network = bn_lenet(**checkpoint.metadata["network"]["options"]).eval()
    network.load_state_dict(checkpoint.state)
    dataset = small_dataset()
    with torch.no_grad():
        logits = network(torch.from_numpy(Preprocessing().apply(dataset.test_images)))
    return (logits.argmax(1).numpy() == dataset.test_labels).mean()


def test_the_accuracies_are_those_of_the_files(tmp_path):
    result = train(CONFIG, out=tmp_path / "a")
    assert accuracy_of(result.checkpoint) == pytest.approx(result.test_accuracy)
    assert accuracy_of(result.model) == pytest.approx(result.recalibrated_accuracy)
    statistics = [load_checkpoint(file).state for file in (result.checkpoint, result.model)]
    assert not torch.equal(statistics[0]["bn1.running_var"], statistics[1]["bn1.running_var"])
    assert torch.equal(statistics[0]["fc1.weight"], statistics[1]["fc1.weight"])
    assert result.gamma == tuple(statistics[1]["bn1.weight"].tolist())


def test_without_recalibration_the_model_has_the_moving_statistics(tmp_path):
    result = train(replace(CONFIG, epochs=1, recalibrate=False), out=tmp_path / "a")
    assert result.recalibrated_accuracy is None
    assert load_checkpoint(result.model).metadata["recalibrated"] is False
    assert same(result.checkpoint, result.model)


def test_the_network_learns_the_embedded_digits(tmp_path, monkeypatch):
    monkeypatch.undo()
    result = train(TrainingConfig(dataset="digits", epochs=3, batch_size=128, device="cpu"), out=tmp_path / "a")
    assert result.recalibrated_accuracy > 0.9


def test_a_seed_gives_one_result_and_leaves_the_callers_random_state(tmp_path):
    torch.manual_seed(42)
    before = torch.get_rng_state()
    train(replace(CONFIG, epochs=1), out=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    train(replace(CONFIG, epochs=1), out=tmp_path / "b")
    train(replace(CONFIG, epochs=1, seed=4), out=tmp_path / "c")
    assert same(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")
    assert not same(tmp_path / "a" / "model.safetensors", tmp_path / "c" / "model.safetensors")


# --- interruptions


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, whole, epoch):
    with pytest.raises(Stopped):
        train(CONFIG, out=tmp_path / "a", progress=StopAt(epoch))
    resumed = train(CONFIG, out=tmp_path / "a", resume=True)
    assert same(resumed.model, whole.model)
    assert same(resumed.checkpoint, whole.checkpoint)
    for one, other in zip(resumed.history, whole.history, strict=True):
        assert {**one, "examples_per_s": 0} == {**other, "examples_per_s": 0}


@pytest.mark.parametrize("norm", ["scratch", "none"])
def test_a_resumed_run_of_the_other_norms(tmp_path, norm):
    config = replace(CONFIG, norm=norm, epochs=2)
    with pytest.raises(Stopped):
        train(config, out=tmp_path / "a", progress=StopAt(2))
    assert same(train(config, out=tmp_path / "a", resume=True).model, train(config, out=tmp_path / "b").model)


def test_more_epochs_continue_from_the_end(tmp_path, whole):
    train(replace(CONFIG, epochs=2), out=tmp_path / "a")
    grown = train(CONFIG, out=tmp_path / "a", resume=True)
    assert same(grown.model, whole.model)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["epochs"] == 3


def test_resuming_a_complete_run_writes_the_model_again(tmp_path):
    first = train(CONFIG, out=tmp_path / "a")
    content = first.model.read_bytes()
    first.model.unlink()
    (tmp_path / "a" / "metrics.jsonl").unlink()
    (tmp_path / "a" / ".checkpoint.safetensors.abc.part").write_bytes(b"half")
    again = train(CONFIG, out=tmp_path / "a", resume=True, progress=StopAt(4, 1))
    assert again.model.read_bytes() == content
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 3
    assert [path.name for path in (tmp_path / "a").glob(".*")] == [".run.lock"]


CHILD = """
import os, signal, sys
from pathlib import Path
import test_run
from bnexport.training import preparation, training_run
preparation.load_dataset = test_run.small_dataset

class Kill(test_run.StopAt):
    def on_batch(self, done, total):
        if (self.now, done) == (self.epoch, self.batch):
            os.kill(os.getpid(), signal.SIGKILL)

def kill_in_write(count):
    replace, left = Path.replace, [count]
    def dying(self, target):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)
    Path.replace = dying

if sys.argv[2] == "batch":
    progress = Kill(2)
else:
    progress = None
    kill_in_write(int(sys.argv[3]))
training_run.train(test_run.CONFIG, out=sys.argv[1], progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("moment", "epochs"),
    [
        (("write", "4"), 1),  # the second checkpoint
        (("batch",), 1),
        (("write", "1"), 0),  # config.json
    ],
)
def test_a_killed_run_is_readable_and_resumes_to_the_same_weights(tmp_path, whole, moment, epochs):
    out = tmp_path / "a"
    folder = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(out), *moment], env=environment, capture_output=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    if epochs:
        checkpoint = load_checkpoint(out / "checkpoint.safetensors")
        assert checkpoint.metadata["training"]["epoch"] == epochs
        rows = (out / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(row) for row in rows)
    else:
        assert not (out / "checkpoint.safetensors").exists()
    resumed = train(CONFIG, out=out, resume=True)
    assert same(resumed.model, whole.model)
    assert [path.name for path in out.glob(".*")] == [".run.lock"]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    out = tmp_path / "a"
    train(replace(CONFIG, epochs=1), out=out)
    before = (out / "checkpoint.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bnexport.files.os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        train(CONFIG, out=out, resume=True)
    assert (out / "checkpoint.safetensors").read_bytes() == before


# --- refusals
