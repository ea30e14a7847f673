from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bundles import copy_bundle, network
from support.environments import environment
from support.serving import Server, serving
from support.shared import made_once

from bnexport.bundle import Bundle
from bnexport.data.datasets import load_dataset
from bnexport.data.preprocessing import Preprocessing

#: With protobuf 7 pip silently takes tritonclient 2.41, of 2023.
PINS = ("tritonclient[http,grpc]>=2.60", "protobuf>=6.33.5,<7", "numpy>=2")


@pytest.fixture(scope="session")
def models(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models with one version of one model; not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    copy_bundle(bundle, folder / "bn_lenet" / "1")
    return folder


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server, over HTTP and gRPC, for all tests that leave it as it is."""
    with serving(models, tmp_path_factory.mktemp("log") / "log", "--grpc-port", "0") as running:
        yield running


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return load_dataset("digits").test_images[:12]


@pytest.fixture(scope="session")
def images(pixels: np.ndarray) -> np.ndarray:
    return Preprocessing().apply(pixels)


@pytest.fixture(scope="session")
def logits(images: np.ndarray) -> np.ndarray:
    """Logits of the unfolded network in float64."""
    with torch.no_grad():
        return copy.deepcopy(network()).double()(torch.from_numpy(images).double()).numpy()


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with tritonclient: its protobuf is older than the one onnx brings."""
    folder = made_once(tmp_path_factory, "tritonclient", lambda folder: environment(folder, *PINS))
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def kserve_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with KServe's SDK, which needs an old protobuf too: 330 MB."""
    requirements = ("kserve>=0.17", "protobuf<7")
    folder = made_once(tmp_path_factory, "kserve", lambda folder: environment(folder, *requirements))
    return folder / "bin" / "python"
