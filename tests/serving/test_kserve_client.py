"""KServe's SDK, unchanged, in a separate environment: its protobuf is older than onnx's.

Its clients send requests to ``bnexport serve``, and its classes read what ``bnexport deploy kserve`` writes.
"""

import copy
import functools
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import pixel_bundle
from support.environments import run_program
from support.serving import Server, serving

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.deploying.deploy_request import DEVICES, SCALE_METRICS, DeployRequest, Scaling
from bnexport.deploying.kserve import inference_service

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory, images: np.ndarray, logits: np.ndarray) -> dict[str, str]:
    return saved(tmp_path_factory.mktemp("arrays"), inputs=images, logits=logits)


def saved(folder: Path, **arrays: np.ndarray) -> dict[str, str]:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return {name: str(folder / f"{name}.npy") for name in arrays}


def drive(python: Path, what: str, server: Server, arrays: dict[str, str], **more: str) -> Any:
    """Return what the clients did without failures."""
    task = {"drive": what, "url": f"http://127.0.0.1:{server.port}", **arrays, **more}
    result = run_program(python, HERE / "kserve_program.py", task)
    assert result["wrong"] == []
    return result


def test_every_call_over_http(kserve_python: Path, server: Server, arrays: dict[str, str]) -> None:
    result = drive(kserve_python, "rest", server, arrays)
    assert tuple(map(int, result["versions"]["kserve"].split(".")[:2])) >= (0, 17)
    assert int(result["versions"]["protobuf"].partition(".")[0]) < 7
    assert len(result["done"]) > 100


def test_a_token(kserve_python: Path, models: Path, arrays: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with serving(models, tmp_path / "log", "--token-file", str(tmp_path / "token")) as guarded:
        result = drive(kserve_python, "token", guarded, arrays, token=TOKEN)
    assert len(result["done"]) == 5


def test_a_model_that_is_not_ready(kserve_python: Path, models: Path, arrays: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "bn_lenet" / "1"
    shutil.copytree(models / "bn_lenet" / "1", folder)
    with (folder / MODEL_ONNX).open("ab") as file:
        file.write(b"more")
    with serving(tmp_path / "models", tmp_path / "log") as server:
        result = drive(kserve_python, "unready", server, arrays)
    assert len(result["done"]) == 4


def test_every_call_over_grpc(kserve_python: Path, models: Path, arrays: dict[str, str], tmp_path: Path) -> None:
    with serving(models, tmp_path / "log", "--grpc-port", "0") as server:
        result = drive(kserve_python, "grpc", server, arrays, grpc=f"127.0.0.1:{server.grpc_port}")
    assert len(result["done"]) > 15


def test_pixels(kserve_python: Path, bundle: Bundle, pixels: np.ndarray, logits: np.ndarray, tmp_path: Path) -> None:
    """A bundle that takes uint8: JSON and binary tensors over HTTP, typed and raw tensors over gRPC."""
    pixel_bundle(bundle, tmp_path / "m" / "bn_lenet" / "1")
    arrays = saved(tmp_path, inputs=pixels[:, None], logits=logits)
    with serving(tmp_path / "m", tmp_path / "log", "--grpc-port", "0") as server:
        stated = server.ask("GET", "/v2/models/bn_lenet").json["inputs"]
        assert stated == [{"name": "input", "datatype": "UINT8", "shape": [-1, 1, 28, 28]}]
        result = drive(kserve_python, "pixels", server, arrays, grpc=f"127.0.0.1:{server.grpc_port}")
    assert len(result["done"]) > 80


def changed(service: dict[str, Any], place: str, value: object) -> dict[str, Any]:
    """Return a copy with one field set, or removed if the value is None."""
    service = copy.deepcopy(service)
    *path, last = place.split("/")
    inner = functools.reduce(dict.__getitem__, path, service)
    inner[last] = value
    if value is None:
        del inner[last]
    return service


def test_services_are_kserves_own(kserve_python: Path) -> None:
    """Every field has the name and the type of the SDK's classes; a wrong field is found."""
    services = [
        inference_service("m", DeployRequest(device=device), scaling, model_bytes=2**20, namespace=namespace)
        for device, metric, namespace in itertools.product(DEVICES, SCALE_METRICS, (None, "vision"))
        for scaling in (Scaling("s3://bucket/models", 1, 6, metric, 50),)
    ]
    good, model = services[0], "spec/predictor/model"
    bad = [
        changed(good, "spec/replicas", 3),
        changed(good, "spec/predictor/scaleMetrics", "x"),
        changed(good, "spec/predictor/minReplicas", "many"),
        changed(good, f"{model}/storageURI", "x"),
        changed(good, f"{model}/modelFormat", None),
        changed(good, f"{model}/modelFormat", {"version": "1"}),
        changed(good, f"{model}/resources", {"limit": {"cpu": "1"}}),
        changed(good, "metadata/nameSpace", "x"),
    ]
    documents = [*services, *bad]
    result = run_program(kserve_python, HERE / "kserve_service_program.py", documents)
    agrees = [answer == document for answer, document in zip(result, documents, strict=True)]
    assert agrees == [True] * len(services) + [False] * len(bad), result[-len(bad) :]
