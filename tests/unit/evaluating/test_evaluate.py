import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bundles import copy_bundle, network
from support.pictures import write_parts, write_pictures
from torch import nn
from unit.evaluating.conftest import TEST, Write, inputs, lenet

from bnexport.bundle import Bundle
from bnexport.errors import BundleError, DataError, ModelError, NetworkError, UsageError
from bnexport.evaluating.evaluate import EvaluationRequest, evaluate_path

IMAGES, LABELS = TEST


def given(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(inputs(IMAGES)).argmax(1).numpy()


@pytest.mark.parametrize("batch_size", [1, 33, 80, 1000])
def test_a_checkpoint(write: Write, batch_size: int) -> None:
    done: list[tuple[int, int]] = []
    found = evaluate_path(
        write(),
        EvaluationRequest(batch_size=batch_size, device="cpu"),
        on_batch=lambda images, total: done.append((images, total)),
    )
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (LABELS, given(lenet())), 1)
    assert (found.confusion == expected).all()
    assert (found.n, found.correct) == (80, np.trace(expected))
    assert (found.runtime, found.dataset) == ("torch-cpu", "digits")
    assert found.interval[0] < found.accuracy < found.interval[1]
    assert done[-1] == (80, 80)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(lenet()(inputs(IMAGES)).double(), torch.from_numpy(LABELS))
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["confusion"] == expected.tolist()
    assert value["accuracy_95"] == list(found.interval)
    assert value["environment"]["packages"]


def test_a_run_directory_and_another_data_set(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnexport.evaluating.evaluate.load_test_images", lambda *_, **__: TEST)
    folder = write().parent
    assert evaluate_path(folder, EvaluationRequest()).note == ""
    with pytest.raises(UsageError, match="the classes of kmnist differ; first difference at class 0: '0' and 'o'"):
        evaluate_path(folder, EvaluationRequest(dataset="kmnist"))
    unnamed = evaluate_path(write(labels=None), EvaluationRequest(dataset="kmnist"))
    assert unnamed.note.split("; ")[0] == "the network was trained on digits"


@pytest.mark.parametrize("runtime", [None, "torchscript-cpu", "torch-cpu"])
def test_a_bundle_on_its_runtimes(bundle: Bundle, runtime: str | None) -> None:
    found = evaluate_path(bundle.path, EvaluationRequest(runtime=runtime, batch_size=32))
    assert found.runtime == (runtime or "onnxruntime-cpu")
    assert found.correct == int((given(network()) == LABELS).sum())
    assert found.accuracy > 0.3, "the bundle's network reads digits"


def test_a_folder_without_a_test_part_is_reported(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = [f"{label}/{index}.png" for label in ("cat", "dog") for index in range(4)]
    request = EvaluationRequest(dataset=f"folder:{write_pictures(tmp_path / 'flat', *names)}", device="cpu")
    network = {"source": "bn_lenet", "options": {"norm": "torch", "in_channels": 1, "num_classes": 2}}
    path = write(module=lenet(num_classes=2), dataset=None, labels=None, network=network)
    assert "has no test part: bnexport held out 10% of each class" in evaluate_path(path, request).note
    parts = EvaluationRequest(dataset=f"folder:{write_parts(tmp_path / 'parts')}", device="cpu")
    assert "no test part" not in evaluate_path(path, parts).note
    trained = write(module=lenet(num_classes=2), dataset=request.dataset, labels=None, network=network)
    assert "no test part" not in evaluate_path(trained, request).note


def test_options_that_do_not_go_together(bundle: Bundle, write: Write) -> None:
    for path, request, words in (
        (bundle.path, EvaluationRequest(device="cpu"), "--device is for a checkpoint"),
        (bundle.path, EvaluationRequest(source="x.py:f"), "--source is for a checkpoint"),
        (write(), EvaluationRequest(runtime="torch-cpu"), "--runtime is for a bundle"),
        (write(), EvaluationRequest(batch_size=0), "the batch size is 0"),
        (write("unnamed.safetensors", dataset=None), EvaluationRequest(), "does not state the data set"),
        (write(), EvaluationRequest(dataset="imagenet"), "'imagenet' is unknown"),
    ):
        with pytest.raises(UsageError) as caught:
            evaluate_path(path, request)
        assert words in caught.value.sentence


def test_a_changed_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path / "copy")
    (folder / "extra").write_text("x")
    with pytest.raises(BundleError, match="extra"):
        evaluate_path(folder, EvaluationRequest())


def test_another_number_of_classes(write: Write) -> None:
    options = {"norm": "torch", "in_channels": 1, "num_classes": 7}
    path = write(module=lenet(num_classes=7), network={"source": "bn_lenet", "options": options})
    with pytest.raises(DataError, match="returns 7 scores, but the data set has 10 classes"):
        evaluate_path(path, EvaluationRequest())


NETWORKS = """
import torch
from torch import nn
from bnexport.nn.lenet import bn_lenet
def lenet(norm="torch"): return bn_lenet(norm)
class Odd(nn.Module):
    def __init__(self): super().__init__(); self.p = nn.Parameter(torch.zeros(1))
class Colour(Odd):
    def forward(self, x): return x.expand(-1, 2, -1, -1).reshape(len(x), 3, 9999)
class Maps(Odd):
    def forward(self, x): return x
class Nan(Odd):
    def forward(self, x): return x.mean((2, 3)).expand(-1, 10) / self.p
"""


def test_a_user_s_own_network(write: Write, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORKS)
    torch.save(lenet().state_dict(), tmp_path / "weights.pt")
    request = EvaluationRequest(source=f"{tmp_path}/net.py:lenet", dataset="digits")
    expected = int((given(lenet()) == LABELS).sum())
    assert evaluate_path(tmp_path / "weights.pt", request).correct == expected
    named = {"source": "net.py:lenet", "options": {"norm": "torch"}}
    path = write(module=lenet(), network=named)
    assert evaluate_path(path, EvaluationRequest(source=f"{tmp_path}/net.py:lenet")).dataset == "digits"
    with pytest.raises(ModelError, match="but not its code"):
        evaluate_path(path, EvaluationRequest())


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("Colour", ModelError, "fails on images of shape 80x1x28x28 at net.py:9"),
        ("Maps", ModelError, "has no row of scores per image"),
        ("Nan", DataError, "NaN or infinity"),
    ],
)
def test_networks_that_are_not_classifiers(tmp_path: Path, name: str, error: type[Exception], words: str) -> None:
    (tmp_path / "net.py").write_text(NETWORKS)
    torch.save({"p": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(error, match=words):
        evaluate_path(tmp_path / "weights.pt", EvaluationRequest(source=f"{tmp_path}/net.py:{name}", dataset="digits"))


def test_no_data_and_no_network(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNEXPORT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def offline(*_: object, **__: object) -> None:
        raise NetworkError("t10k could not be downloaded", remedy="Use --data-dir")

    monkeypatch.setattr("bnexport.data.locate.download_file", offline)
    with pytest.raises(NetworkError):
        evaluate_path(write(dataset="mnist"), EvaluationRequest())


@pytest.mark.needs("data")
def test_the_reference_bundle_on_real_images() -> None:
    reference = Path(__file__).parents[3] / "models" / "bn_lenet" / "1"
    found = evaluate_path(reference, EvaluationRequest())
    assert found.n == 10_000
    stored = json.loads((reference / "manifest.json").read_text())["verification"]
    assert str(found.correct) in json.dumps(stored), "the bundle's own verification counted the same"
