"""A real Triton reads what ``bnexport deploy triton`` writes, and serves by it.

The server has no ONNX Runtime backend. So it reads our files whole until that is all that is missing; and it serves by
configurations of which two words are changed, those that name the backend and its file, with ``model.py`` as the engine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import copy_bundle, reseal, write_bundle
from support.environments import environment, run_program
from support.serving import serving
from support.triton import REQUIREMENTS, Installation, Triton, installation, triton
from support.triton_config_check import read_config
from unit.deploying.conftest import FOREIGN, fixed, foreign_bundle

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.deploying.deploy_request import DEVICES, DeployRequest
from bnexport.deploying.triton_repository import LABELS, deploy_triton
from bnexport.exporting.triton_config import CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.needs("triton")]
HERE = Path(__file__).parent
MISSING = "unable to find backend library for backend 'onnxruntime'"
#: Bundle and device of the models that are served.
SERVED = (
    *(("bn_lenet", device) for device in DEVICES),
    ("foreign", "cpu"),
    ("foreign", "cuda"),
    ("fixed", "cpu"),
    ("fixed", "cuda"),
)
WARMUPS = {"bn_lenet": ["batch_1", "batch_64"], "foreign": ["batch_1", "batch_64"], "fixed": ["batch_1"]}
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


def deploy(repository: Path, bundle: Bundle, name: str, **options: Any) -> Path:
    """A model's folder in a server's repository, as bnexport writes it."""
    out = repository.parent / f"out_{name}"
    deploy_triton(bundle, out, DeployRequest(name=name, **options))
    return shutil.move(out / name, repository / name)


def unused(server: Triton) -> str:
    return f"mistake_{len(list(server.repository.iterdir()))}"


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
    """Return the configuration from the server's log, without the defaults that Triton adds."""
    (config,) = re.findall(r'Server side auto-completed config: "\n(.*?)\n\n', log, re.DOTALL)
    return read_config(config.replace('platform: "onnxruntime_onnx"\n', ""))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", ["bn_lenet", "foreign", "fixed"])
def test_only_the_backend_is_missing(server: Triton, bundles: dict[str, Bundle], which: str, device: str) -> None:
    name = f"read_{which}_{device}"
    folder = deploy(server.repository, bundles[which], name, device=device, instances=2)
    error, log = server.load(name)
    assert error.startswith(f"load failed for model '{name}': version ")
    assert MISSING in error
    errors = [line for line in log.splitlines() if re.match(r"E\d{4} ", line)]
    assert errors
    assert all(MISSING in line for line in errors)
    assert understood(log) == read_config((folder / CONFIG).read_text())


@pytest.mark.parametrize(
    ("old", "new", "message"),
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
    server: Triton, bundles: dict[str, Bundle], old: str, new: str, message: str
) -> None:
    """The control of the test above: this server does look."""
    name = unused(server)
    folder = deploy(server.repository, bundles["bn_lenet"], name)
    change(folder, (old, new))
    error, log = server.load(name)
    assert error
    assert message in log
    assert MISSING not in error + log


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LABELS, "names.txt", "failed to open text file"),
        ("count: 1 kind: KIND_CPU", "count: 1 kind: KIND_GPU gpus: [ 99 ]", "invalid or unsupported gpu id 99"),
    ],
)
def test_mistakes_that_loading_shows(
    server: Triton, bundles: dict[str, Bundle], old: str, new: str, message: str
) -> None:
    """Those that show before the backend makes an instance: this one aborts at times while it gives one up."""
    name = unused(server)
    change(for_python(deploy(server.repository, bundles["bn_lenet"], name)), (old, new))
    error, _ = server.load(name)
    assert message in error


@pytest.fixture
def served(server: Triton, bundles: dict[str, Bundle], tmp_path: Path) -> list[dict[str, Any]]:
    """Loaded models, as client_program.py wants them described."""
    models = []
    for which, device in SERVED:
        bundle, name = bundles[which], f"{which}_{device}"
        for_python(deploy(server.repository, bundle, name, device=device))
        error, log = server.load(name)
        assert error == ""
        assert warmed(log) == ([] if device == "cpu" else WARMUPS[which]), "before the model is ready"
        inputs, outputs = bundle.golden()
        arrays = {f"in:{key}": array for key, array in inputs.items()} | {f"out:{k}": v for k, v in outputs.items()}
        np.savez(tmp_path / f"{name}.npz", **arrays)
        labels, most = (NAMES if which == "bn_lenet" else None), (0 if which == "fixed" else 64)
        models.append({"name": name, "arrays": str(tmp_path / f"{name}.npz"), "labels": labels, "max_batch": most})
    return models


def warmed(log: str) -> list[str]:
    return sorted(re.findall(r"is running warmup sample '(\w+)'", log))


def test_it_serves_by_these_configurations(
    found: Installation, server: Triton, bundles: dict[str, Bundle], served: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Numbers, labels, batches and shapes by the stock client; the same client gets the same from bnexport serve."""
    for model in served:
        if model["labels"]:
            shutil.copytree(bundles["bn_lenet"].path, tmp_path / "models" / model["name"] / "1")
    with serving(tmp_path / "models", tmp_path / "log") as ours:
        task = {"http": server.http, "grpc": server.grpc, "ours": ours.port, "models": served}
        result = run_program(found.python, HERE / "client_program.py", task)
    assert result["wrong"] == []
    assert len(result["done"]) > 1000


def test_it_passes_the_test_of_our_own_server(found: Installation, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """The control of tests/serving/test_tritonclient.py: Triton behaves as that test requires of bnexport serve."""
    (tmp_path / "triton" / "repository").mkdir(parents=True)
    for_python(deploy(tmp_path / "triton" / "repository", bundles["bn_lenet"], "bn_lenet"))
    inputs, outputs = bundles["bn_lenet"].golden()
    np.save(tmp_path / "inputs.npy", inputs["input"])
    np.save(tmp_path / "logits.npy", outputs["logits"])
    with triton(found, tmp_path / "triton", mode="none") as server:
        words = [str(found.python), str(HERE.parent / "serving" / "triton_program.py"), str(server.http)]
        words += [str(tmp_path / name) for name in ("inputs.npy", "logits.npy")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert set(result["wrong"]) == {"get_server_metadata", "a wrong shape is refused"}, "its own name and its own words"
    assert len(result["done"]) > 60
