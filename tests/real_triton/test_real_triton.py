"""A real Triton reads what ``bnexport deploy triton`` writes, and serves by it.

The server has no ONNX Runtime backend. So it reads our files whole until that is all that is missing; and it serves by
configurations of which two words are changed, those that name the backend and its file, with ``model.py`` as the engine.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import copy_bundle, reseal, write_bundle
from support.environments import environment, run_program
from support.serving import serving
from support.triton import REQUIREMENTS, Installation, Triton, installation, triton
from unit.deploying.conftest import FOREIGN, fixed, foreign_bundle

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.deploying.model_config import read_config
from bnexport.deploying.repository import deploy_triton
from bnexport.deploying.request import DEVICES, DeployRequest
from bnexport.exporting.triton import CONFIG

pytestmark = pytest.mark.needs("triton")
HERE = Path(__file__).parent
MISSING = "unable to find backend library for backend 'onnxruntime'"
NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    named = os.environ["BNEXPORT_TRITON"]
    if named != "install":
        return installation(Path(named))
    return installation(environment(tmp_path_factory.mktemp("triton") / "venv", *REQUIREMENTS))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Reference model with labels, two inputs of which one is a value per sample, a batch that does not vary."""
    root = tmp_path_factory.mktemp("bundles")
    reference = copy_bundle(write_bundle(root / "plain" / "1"), root / "models" / "bn_lenet" / "1")
    return {
        "bn_lenet": reseal(reference, labels=NAMES),
        "foreign": foreign_bundle(root / "foreign" / "4"),
        "fixed": foreign_bundle(root / "fixed" / "4", fixed(FOREIGN, 3)),
    }


@pytest.fixture(scope="session")
def server(found: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    with triton(found, tmp_path_factory.mktemp("real") / "triton") as running:
        yield running


def deploy(server: Triton, bundle: Bundle, name: str, **options: Any) -> Path:
    """A model's folder in the server's repository, as bnexport writes it."""
    out = server.repository.parent / f"out_{name}"
    deploy_triton(bundle, out, DeployRequest(name=name, **options))
    return shutil.move(out / name, server.repository / name)


def for_python(folder: Path) -> Path:
    """Let the Python backend run a deployed model on a CPU: it is the one that is here."""
    change(folder, ('backend: "onnxruntime"', 'backend: "python"'))
    change(folder, (f'"{MODEL_ONNX}"', '"model.py"'))
    (version,) = (item for item in folder.iterdir() if item.is_dir())
    shutil.copyfile(HERE / "model.py", version / "model.py")
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("KIND_GPU", "KIND_CPU"))
    return folder


def change(folder: Path, words: tuple[str, str]) -> None:
    text = (folder / CONFIG).read_text()
    assert words[0] in text
    (folder / CONFIG).write_text(text.replace(*words))


def understood(log: str) -> Any:
    """The configuration as the server tells it in its log, without what it adds."""
    (told,) = re.findall(r'Server side auto-completed config: "\n(.*?)\n\n', log, re.DOTALL)
    return read_config(told.replace('platform: "onnxruntime_onnx"\n', ""))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", ["bn_lenet", "foreign", "fixed"])
def test_only_the_backend_is_missing(server: Triton, bundles: dict[str, Bundle], which: str, device: str) -> None:
    name = f"read_{which}_{device}"
    folder = deploy(server, bundles[which], name, device=device, instances=2)
    error, log = server.load(name)
    assert error.startswith(f"load failed for model '{name}': version ")
    assert MISSING in error
    errors = [line for line in log.splitlines() if re.match(r"E\d{4} ", line)]
    assert errors
    assert all(MISSING in line for line in errors)
    assert understood(log) == read_config((folder / CONFIG).read_text())


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("max_batch_size: 64", "max_batch_sise: 64", 'no field named "max_batch_sise"'),
        ("max_batch_size: 64", 'max_batch_size: "64"', "Expected integer"),
        ("max_batch_size: 64", "max_batch_size: 64 max_batch_size: 64", "specified multiple times"),
        ("max_batch_size: 64", "max_batch_size: -3", "must be non-negative"),
        ("TYPE_FP32", "TYPE_FP31", 'Unknown enumeration value of "TYPE_FP31"'),
        ("dynamic_batching { }", "dynamic_batching {", "ModelDynamicBatching"),
        ("dims: [ 10 ]", "dims: [ 0 ]", "dimension must be integer >= 1"),
        ('name: "mistake', 'name: "another', "directory name must equal model name"),
        ("KIND_CPU", "KIND_TPU", 'Unknown enumeration value of "KIND_TPU"'),
    ],
)
def test_mistakes_are_refused_for_what_they_are(
    server: Triton, bundles: dict[str, Bundle], old: str, new: str, told: str
) -> None:
    """The control of the test above: this server does look."""
    name = f"mistake_{len(list(server.repository.iterdir()))}"
    folder = deploy(server, bundles["bn_lenet"], name)
    change(folder, (old, new))
    error, log = server.load(name)
    assert error
    assert told in log
    assert MISSING not in error + log


def test_it_serves_by_these_configurations(
    found: Installation, server: Triton, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    """Numbers, labels, batches and shapes by the stock client; the same client gets the same from bnexport serve."""
    models = []
    for which, device in (*(("bn_lenet", device) for device in DEVICES), ("foreign", "cpu"), ("fixed", "cpu")):
        bundle, name = bundles[which], which if device == "cpu" else f"{which}_{device}"
        for_python(deploy(server, bundle, name, device=device))
        error, log = server.load(name)
        assert error == ""
        for batch in ("batch_1", "batch_64"):
            assert (f"is running warmup sample '{batch}'" in log) == (device != "cpu"), "before the model is ready"
        inputs, outputs = bundle.golden()
        arrays = {f"in:{key}": array for key, array in inputs.items()} | {f"out:{k}": v for k, v in outputs.items()}
        np.savez(tmp_path / f"{name}.npz", **arrays)
        labels, most = (NAMES if name == "bn_lenet" else None), (0 if which == "fixed" else 64)
        models.append({"name": name, "arrays": str(tmp_path / f"{name}.npz"), "labels": labels, "max_batch": most})
    with serving(bundles["bn_lenet"].path.parents[1], tmp_path / "log") as ours:
        task = {"http": server.http, "grpc": server.grpc, "ours": ours.port, "models": models}
        told = run_program(found.python, HERE / "client_program.py", task)
    assert told["wrong"] == []
    assert len(told["done"]) > 1000
