"""Shared fixtures and samples of the tests of the server's parts."""

from pathlib import Path

import numpy as np
import pytest
from support.bundles import copy_bundle

from bnexport.bundle import Bundle
from bnexport.serving import served_model
from bnexport.serving.batcher import Cost
from bnexport.serving.repository import Log, Repository
from bnexport.serving.served_model import ServingSettings
from bnexport.serving.serving_limits import ServingLimits
from bnexport.tensors import Signature, TensorSpec

LIMITS = ServingLimits()
TWO = Signature(
    (TensorSpec("x", "float32", ("batch", 3)), TensorSpec("mask", "bool", ("batch", "length"))),
    (TensorSpec("y", "float32", ("batch", 3)), TensorSpec("n", "int64", ("batch",))),
)


def of(dtype: str) -> Signature:
    return Signature((TensorSpec("x", dtype, ("batch", 4)),), (TensorSpec("y", dtype, ("batch", 4)),))


def sample(dtype: str) -> np.ndarray:
    values = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    return (values % 2 if dtype == "bool" else values / (2 if dtype.startswith("float") else 1)).astype(dtype)


def loaded(folder: Path, log: Log = lambda *_, **__: None) -> Repository:
    opened = Repository(folder, ServingSettings(), log)
    opened.load()
    return opened


@pytest.fixture(scope="module")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("models")
    copy_bundle(bundle, folder / "bn_lenet" / "1")
    with pytest.MonkeyPatch.context() as patch:
        # A measured cost above INLINE_SECONDS would send every request to a thread, on a machine that is slow enough.
        patch.setattr(served_model, "measured_cost", lambda *_: Cost(1e-4, 3e-8))
        return loaded(folder)
