"""A network with what users' networks contain, on every runtime: a flatten by view, and tensors that are made in forward.

The runtimes of the CPU run it everywhere, so that the test itself is known to work where a GPU is found.
"""

import numpy as np
import pytest
from support.fake_cuda.bundles import Users
from support.models import randomise
from support.runtimes import RUNTIMES

import bnexport
from bnexport.bundle import Bundle
from bnexport.exporting.export_request import ExportRequest
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import runner_spec
from bnexport.verification.scope import Scope
from bnexport.verification.verify import verify


@pytest.fixture(scope="module")
def network() -> Users:
    return randomise(Users()).eval()


@pytest.fixture(scope="module")
def users(network: Users, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    request = ExportRequest(inputs=("3x8x8",))
    exported = bnexport.fold_and_export(network, tmp_path_factory.mktemp("users") / "users" / "1", request=request)
    assert exported.bundle is not None, exported.verification.failures
    return exported.bundle


@pytest.mark.parametrize("name", RUNTIMES)
def test_it_computes_what_the_network_computes(users: Bundle, network: Users, name: str) -> None:
    spec = runner_spec(name)
    precisions = tuple(precision for precision in ("float32", "tf32") if precision in spec.precisions)
    report = verify(users, runtimes=[name], module=network, scope=Scope(precisions, max_samples=64, drift=False))
    assert report.passed, [row.reason for row in report.failures]


@pytest.mark.parametrize("name", RUNTIMES)
def test_batches_of_any_size_run_after_each_other(users: Bundle, network: Users, name: str) -> None:
    images = np.random.default_rng(2).random((5, 3, 8, 8), dtype=np.float32)
    spec = runner_spec(name)
    with spec.open(users, module=network, settings=RunSettings(binding=spec.engine == "onnxruntime")) as runner:
        whole = runner.run({"input": images})["logits"]
        for size in (1, 5, 3):
            part = runner.run({"input": images[:size]})["logits"]
            np.testing.assert_allclose(part, whole[:size], rtol=0, atol=1e-5 * np.abs(whole).max())
        if spec.device != "cpu":
            assert runner.effective_device == "cuda:0"
