import json
from pathlib import Path

import pytest
import torch
from torch import nn
from unit.evaluating.conftest import TEST, TRAIN, Write, inputs, lenet

from bnexport.errors import FeedError, ModelError, OutputError, UsageError
from bnexport.evaluating.confusion import wilson_interval
from bnexport.evaluating.network_options import DEFINITIONS, RecalibrationRequest
from bnexport.evaluating.recalibration import recalibrate_checkpoint
from bnexport.loading.checkpoint import load_checkpoint
from bnexport.loading.sources import checkpoint_of, load_source
from bnexport.nn.lenet import bn_lenet


def accuracy(state: dict[str, torch.Tensor]) -> float:
    network = bn_lenet()
    network.load_state_dict(state)
    with torch.no_grad():
        return float((network.eval()(inputs(TEST[0])).argmax(1).numpy() == TEST[1]).mean())


def test_batch_statistics_of_the_first_layer_are_those_of_all_its_inputs(write: Write) -> None:
    path = write()
    before = path.read_bytes()
    seen: list[tuple[int, int]] = []
    request = RecalibrationRequest(batch_size=64, device="cpu")
    done = recalibrate_checkpoint(path, None, request, on_batch=lambda n, total: seen.append((n, total)))
    assert done.out == path.with_name("model.recalibrated.safetensors")
    assert path.read_bytes() == before, "the input is untouched"
    assert seen[-1] == (300, 300)
    state = load_checkpoint(done.out).state
    with torch.no_grad():
        values = lenet().conv1(inputs(TRAIN[0])).double().movedim(1, -1).reshape(-1, 6)
    assert torch.allclose(state["bn1.running_mean"].double(), values.mean(0), rtol=1e-5, atol=1e-7)
    assert torch.allclose(state["bn1.running_var"].double(), values.var(0, correction=0), rtol=1e-5)
    unchanged = {key for key in state if "running" not in key and "num_batches" not in key}
    assert all(torch.equal(state[key], lenet().state_dict()[key]) for key in unchanged)
    assert done.before.correct / 80 == pytest.approx(accuracy(lenet().state_dict()))
    assert done.after.correct / 80 == pytest.approx(accuracy(state))
    assert [layer.name for layer in done.distance.layers] == ["bn1", "bn2", "bn3", "bn4"]
    assert done.distance.stale, "random statistics are"


def test_the_checkpoint_records_the_change_and_the_earlier_state(write: Write) -> None:
    path = write(training={"epoch": 3}, word="of another version")
    request = RecalibrationRequest("population", samples=100, batch_size=40, seed=5)
    done = recalibrate_checkpoint(path, path.with_name("out.safetensors"), request)
    expected = {"definition": "population", "dataset": "digits", "images": 100, "batch_size": 40, "seed": 5}
    metadata = load_checkpoint(done.out).metadata
    assert metadata["recalibration"] == done.facts == expected
    assert metadata["recalibrated"] is True
    assert (metadata["training"], metadata["word"]) == ({"epoch": 3}, "of another version")
    loaded = load_source(str(done.out))
    assert loaded.training["recalibration"] == expected
    assert checkpoint_of(loaded).metadata["recalibration"] == expected, "a bundle keeps it"
    value = json.loads(json.dumps(done.to_json(), allow_nan=False))
    assert value["after"]["accuracy_95"] == list(wilson_interval(done.after.correct, 80))


def test_population_statistics_do_not_depend_on_batch_size_or_seed(write: Write) -> None:
    path = write()
    states = []
    for size, seed in ((300, 0), (7, 1), (1, 2)):
        request = RecalibrationRequest("population", batch_size=size, seed=seed, force=True)
        states.append(load_checkpoint(recalibrate_checkpoint(path, None, request).out).state)
    for name in [key for key in states[0] if "running" in key]:
        for other in states[1:]:
            spread = float((other[name] - states[0][name]).abs().max() / states[0][name].abs().max())
            assert spread < 1e-5, name


def test_a_second_recalibration_finds_nothing_off(write: Write) -> None:
    for definition in DEFINITIONS:
        first = recalibrate_checkpoint(write(), None, RecalibrationRequest(definition, force=True))
        again = recalibrate_checkpoint(first.out, None, RecalibrationRequest(definition))
        assert max(layer.error for layer in again.distance.layers) < 1e-5
        again.out.unlink()


def test_no_single_image_is_left_for_the_last_batch(write: Write) -> None:
    done = recalibrate_checkpoint(write(), None, RecalibrationRequest(samples=65, batch_size=64))
    assert done.facts["images"] == 65
    with pytest.raises(FeedError, match="needs at least 2"):
        recalibrate_checkpoint(write(), None, RecalibrationRequest(batch_size=1, force=True))


def test_nothing_is_written_over(write: Write, tmp_path: Path) -> None:
    path = write()
    (tmp_path / "there.safetensors").write_bytes(b"something")
    (tmp_path / "link.safetensors").symlink_to(path)
    before = path.read_bytes()
    for out, force, words in (
        (path, True, "is the checkpoint that is read"),
        (tmp_path / "link.safetensors", True, "is the checkpoint that is read"),
        (tmp_path / "there.safetensors", False, "exists already"),
        (tmp_path, True, "is a folder"),
    ):
        with pytest.raises(OutputError, match=words):
            recalibrate_checkpoint(path, out, RecalibrationRequest(force=force))
    assert path.read_bytes() == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"something"
    recalibrate_checkpoint(path, tmp_path / "there.safetensors", RecalibrationRequest(force=True))
    assert load_checkpoint(tmp_path / "there.safetensors").metadata["recalibrated"] is True


NETWORK = """
from torch import nn
from bnexport.nn.lenet import bn_lenet
def lenet(): return bn_lenet("scratch")
class Fails(nn.Sequential):
    def forward(self, x): return super().forward(x.flatten(1)) if not self[1].training else 1 / 0
def fails(): return Fails(nn.Linear(784, 10), nn.BatchNorm1d(10))
"""


def test_a_user_s_own_network_from_plain_weights(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    torch.manual_seed(0)
    torch.save(bn_lenet("scratch").state_dict(), tmp_path / "weights.pt")
    request = RecalibrationRequest(dataset="digits", source=f"{tmp_path}/net.py:lenet")
    done = recalibrate_checkpoint(tmp_path / "weights.pt", None, request)
    assert done.out.name == "weights.recalibrated.safetensors"
    found = load_checkpoint(done.out)
    assert found.metadata["network"]["source"].endswith("net.py:lenet")
    assert not torch.equal(found.state["bn1.moving_var"], torch.ones(6))
    again = RecalibrationRequest(dataset="digits", source=f"{tmp_path}/net.py:lenet")
    assert recalibrate_checkpoint(done.out, None, again).before == done.after


def test_a_network_that_fails(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    torch.save(nn.Sequential(nn.Linear(784, 10), nn.BatchNorm1d(10)).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"fails on images of shape 150x1x28x28 at net.py:6"):
        recalibrate_checkpoint(
            tmp_path / "weights.pt", None, RecalibrationRequest(dataset="digits", source=f"{tmp_path}/net.py:fails")
        )
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == []


def test_nothing_to_re_estimate(write: Write) -> None:
    options = {"norm": "none", "in_channels": 1, "num_classes": 10}
    path = write(module=bn_lenet("none"), network={"source": "bn_lenet", "options": options})
    with pytest.raises(ModelError, match="has no BatchNorm"):
        recalibrate_checkpoint(path, None, RecalibrationRequest())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"definition": "exact"}, "definition 'exact' is unknown"),
        ({"samples": 0}, "samples is 0"),
        ({"batch_size": 0}, "batch size is 0"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        RecalibrationRequest(**changes)  # type: ignore[arg-type]
