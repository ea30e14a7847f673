from pathlib import Path

import pytest
from support.fake_cuda.bundles import AnySize, NoKernel, Users, onnx_bundle
from support.fake_cuda.machine import Machine

from bnexport.bundle import Bundle


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Bundles of networks with what users' networks contain."""
    folder: Path = tmp_path_factory.mktemp("made")
    image = (2, 3, 8, 8)
    return {
        "users": onnx_bundle(folder / "users" / "1", Users(), image),
        "float16": onnx_bundle(folder / "float16" / "1", Users(), image, precision="float16"),
        "any size": onnx_bundle(folder / "sizes" / "1", AnySize(), (2, 3, 12, 10), sizes=True),
        "no kernel": onnx_bundle(folder / "det" / "1", NoKernel(), image),
    }
