"""The stock client of Triton, unchanged, in an environment of its own: its protobuf is older than the one onnx brings."""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
from support.serving import Server

#: With protobuf 7 pip silently takes tritonclient 2.41, of 2023.
PINS = ("tritonclient[http]>=2.60", "protobuf>=6.33.5,<7", "numpy>=2")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client") / "venv"
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "bin" / "python"


def test_every_call(python: Path, server: Server, images: np.ndarray, logits: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "inputs.npy", images)
    np.save(tmp_path / "logits.npy", logits)
    words = [str(Path(__file__).with_name("triton_program.py")), str(server.port)]
    words += [str(tmp_path / name) for name in ("inputs.npy", "logits.npy")]
    done = subprocess.run([str(python), *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["wrong"] == []
    assert tuple(map(int, told["versions"]["tritonclient"].split(".")[:2])) >= (2, 60)
    assert told["versions"]["protobuf"].startswith("6.")
    assert len(told["done"]) > 70
