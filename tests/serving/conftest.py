import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.bundles import copy_bundle, exact_answer
from support.environments import environment
from support.grpc_calls import channel_to
from support.serving import PATIENCE, Server, serving
from support.shared import made_once

from bnexport.bundle import Bundle
from bnexport.data.datasets import load_dataset
from bnexport.data.preprocessing import Preprocessing

#: With protobuf 7, pip silently installs tritonclient 2.41 of 2023.
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


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with channel_to(server) as made:
        yield made


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return load_dataset("digits").test_images[:12]


@pytest.fixture(scope="session")
def images(pixels: np.ndarray) -> np.ndarray:
    return Preprocessing().apply(pixels)


@pytest.fixture(scope="session")
def logits(images: np.ndarray) -> np.ndarray:
    """Logits of the unfolded network in float64."""
    return exact_answer(images)


@pytest.fixture(scope="session")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(words, check=True, capture_output=True, timeout=PATIENCE)
    return certificate, key


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with tritonclient, whose protobuf is older than onnx's."""
    folder = made_once(tmp_path_factory, "tritonclient", lambda folder: environment(folder, *PINS))
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def kserve_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with KServe's SDK, which needs an old protobuf too (330 MB)."""
    requirements = ("kserve>=0.17", "protobuf<7")
    folder = made_once(tmp_path_factory, "kserve", lambda folder: environment(folder, *requirements))
    return folder / "bin" / "python"
