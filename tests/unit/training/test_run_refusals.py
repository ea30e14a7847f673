"""Refusals of a run: other folders, other options, damaged checkpoints, missing devices."""

from dataclasses import replace

import pytest
import torch
from test_run import CONFIG, StopAt, Stopped, _small, accuracy_of, same, small_dataset, whole  # noqa: F401 -- fixtures too

from bnexport.errors import ModelError, OutputError, RuntimeUnavailable, UsageError
from bnexport.loading.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bnexport.training.config import TrainingConfig
from bnexport.training.directory import RunDirectory
from bnexport.training.processes import choose_device
from bnexport.training.training_run import train


def test_an_existing_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    out = tmp_path / "a"
    train(replace(CONFIG, epochs=1), out=out)
    content = (out / "model.safetensors").read_bytes()
    (out / "notes.txt").write_text("mine")

    def never(*_, **__):
        raise AssertionError("loaded")

    with monkeypatch.context() as patch:
        patch.setattr("bnexport.training.preparation.load_dataset", never)
        with pytest.raises(OutputError, match="has a run already") as caught:
            train(CONFIG, out=out)
    assert "--resume" in caught.value.remedy
    assert (out / "model.safetensors").read_bytes() == content
    train(replace(CONFIG, epochs=1, seed=9), out=out, force=True)
    assert (out / "model.safetensors").read_bytes() != content
    assert (out / "notes.txt").read_text() == "mine"


def test_force_keeps_the_old_run_until_the_data_are_there(tmp_path, monkeypatch):
    out = tmp_path / "a"
    train(replace(CONFIG, epochs=1), out=out)

    def broken(*_, **__):
        raise ModelError("no data", remedy="none")

    monkeypatch.setattr("bnexport.training.preparation.load_dataset", broken)
    with pytest.raises(ModelError, match="no data"):
        train(CONFIG, out=out, force=True)
    assert load_checkpoint(out / "model.safetensors").metadata["training"]["epoch"] == 1


def test_an_empty_folder_is_filled(tmp_path):
    train(replace(CONFIG, epochs=1), out=tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def foreign_folder(out):
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def plain_file(out):
    out.write_text("mine")


@pytest.mark.parametrize("make", [foreign_folder, plain_file])
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path, make, resume):
    make(tmp_path / "a")
    with pytest.raises(OutputError):
        train(CONFIG, out=tmp_path / "a", resume=resume)
    assert len(list(tmp_path.rglob("*"))) == (2 if make is foreign_folder else 1)


def test_other_options_are_named(tmp_path):
    out = tmp_path / "a"
    train(replace(CONFIG, epochs=2), out=out)
    with pytest.raises(UsageError, match=r"lr 0\.5.*lr 0\.25"):
        train(replace(CONFIG, lr=0.25), out=out, resume=True)
    with pytest.raises(UsageError, match="epochs 2"):
        train(replace(CONFIG, epochs=1), out=out, resume=True)
    with pytest.raises(UsageError, match="contradict"):
        train(CONFIG, out=out, resume=True, force=True)


def test_options_of_a_run_killed_before_its_first_epoch(tmp_path):
    with pytest.raises(Stopped):
        train(CONFIG, out=tmp_path / "a", progress=StopAt(1))
    with pytest.raises(UsageError, match="seed 3"):
        train(replace(CONFIG, seed=4), out=tmp_path / "a", resume=True)


def test_the_options_of_the_run_that_is_here(tmp_path):
    assert RunDirectory(tmp_path / "none").config_to_resume({"lr": 0.1}) == TrainingConfig(lr=0.1)
    train(replace(CONFIG, epochs=1), out=tmp_path / "a")
    assert RunDirectory(tmp_path / "a").config_to_resume({"epochs": 7}) == replace(CONFIG, epochs=7)


def metadata_without_history(checkpoint):
    training = {**checkpoint.metadata["training"], "history": []}
    return Checkpoint(checkpoint.state, {**checkpoint.metadata, "training": training})


def metadata_without_training(checkpoint):
    return Checkpoint(checkpoint.state, {"network": checkpoint.metadata["network"]})


def other_weights(checkpoint):
    return Checkpoint({"x": torch.zeros(1)}, checkpoint.metadata)


@pytest.mark.parametrize("damage", [metadata_without_history, metadata_without_training, other_weights])
def test_a_damaged_checkpoint(tmp_path, damage):
    out = tmp_path / "a"
    result = train(replace(CONFIG, epochs=1), out=out)
    save_checkpoint(result.checkpoint, damage(load_checkpoint(result.checkpoint)))
    with pytest.raises(ModelError, match=r"checkpoint\.safetensors") as caught:
        train(CONFIG, out=out, resume=True)
    assert "\n" not in str(caught.value)
    result.checkpoint.write_bytes(b"half a file")
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        train(CONFIG, out=out, resume=True)


def test_a_diverged_run_keeps_its_last_whole_epoch(tmp_path):
    out = tmp_path / "a"
    config = replace(CONFIG, norm="none", lr=1e38)
    with pytest.raises(UsageError, match="diverged"):
        train(config, out=out)
    assert not (out / "checkpoint.safetensors").exists()
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("batch_size", [1, 47, 329])
def test_a_last_batch_of_one_image_is_refused_at_once(tmp_path, batch_size):
    with pytest.raises(UsageError, match="the last batch has one of the 330 images"):
        train(replace(CONFIG, batch_size=batch_size), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    train(replace(CONFIG, batch_size=329, norm="none", epochs=1), out=tmp_path / "b")


def test_cuda_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(RuntimeUnavailable, match="no CUDA device"):
        train(replace(CONFIG, device="cuda"), out=tmp_path / "a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_device("cpu").type == "cpu"


@pytest.mark.needs("cuda")
def test_training_on_a_gpu(tmp_path):
    result = train(replace(CONFIG, device="cuda"), out=tmp_path / "a")
    assert result.device == "cuda"
    assert accuracy_of(result.model) == pytest.approx(result.recalibrated_accuracy, abs=0.02)
    assert train(replace(CONFIG, device="cuda", epochs=4), out=tmp_path / "a", resume=True).history[3]["epoch"] == 4
