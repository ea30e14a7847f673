"""What the tests of the server's parts share."""

from __future__ import annotations

import pytest
from support.bundles import write_bundle

from bnexport.serving.repository import Repository
from bnexport.serving.served_model import ServingSettings


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("models")
    write_bundle(folder / "bn_lenet" / "1")
    opened = Repository(folder, ServingSettings(), lambda *_, **__: None)
    opened.load()
    return opened
