from __future__ import annotations

import pytest
from support.bundles import write_bundle

from bnexport.bundle import Bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The right bundle of a network with random statistics."""
    return write_bundle(tmp_path_factory.mktemp("bundle") / "1")
