"""Shared fixtures of the tests of the server's parts."""

from __future__ import annotations

import pytest
from support.bundles import copy_bundle

from bnexport.bundle import Bundle
from bnexport.serving import served_model
from bnexport.serving.batcher import Cost
from bnexport.serving.repository import Repository
from bnexport.serving.served_model import ServingSettings


@pytest.fixture(scope="module")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("models")
    copy_bundle(bundle, folder / "bn_lenet" / "1")
    opened = Repository(folder, ServingSettings(), lambda *_, **__: None)
    with pytest.MonkeyPatch.context() as patch:
        # A measured cost above INLINE_SECONDS would send every request to a thread, on a machine that is slow enough.
        patch.setattr(served_model, "measured_cost", lambda *_: Cost(1e-4, 3e-8))
        opened.load()
    return opened
