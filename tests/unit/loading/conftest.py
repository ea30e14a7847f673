"""Folders with a user's networks."""

from pathlib import Path

import pytest
from weights_files import NETWORK, SMALL


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; net.py in it defines the networks of ``weights_files``."""
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    """A file whose function ``make`` returns a small network."""
    (tmp_path / "net.py").write_text(SMALL)
    return tmp_path / "net.py"
