"""Shared fixtures of the tests of the server's parts."""

from __future__ import annotations

import pytest
from support.bundles import copy_bundle

from bnexport.bundle import Bundle
from bnexport.serving.repository import Repository
from bnexport.serving.served_model import ServingSettings


@pytest.fixture(scope="module")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("models")
    copy_bundle(bundle, folder / "bn_lenet" / "1")
    opened = Repository(folder, ServingSettings(), lambda *_, **__: None)
    opened.load()
    return opened
