"""KServe's own clients, unchanged, in an environment of their own: their protobuf is older than the one onnx brings."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import ROOT, Server, serving

TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory, images: np.ndarray, logits: np.ndarray) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("arrays")
    for name, array in (("inputs", images), ("logits", logits)):
        np.save(folder / f"{name}.npy", array)
    return {name: str(folder / f"{name}.npy") for name in ("inputs", "logits")}


def run(python: Path, program: str, task: dict[str, Any]) -> Any:
    """What a program said about its task."""
    words = [str(python), str(Path(__file__).with_name(program))]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        words, input=json.dumps(task), capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["wrong"] == []
    return told


def task(arrays: dict[str, str], port: int, **more: str) -> dict[str, Any]:
    return {"url": f"http://127.0.0.1:{port}", "grpc": None, "token": None, **arrays, **more}


def test_every_call_over_http(kserve_python: Path, server: Server, arrays: dict[str, str]) -> None:
    told = run(kserve_python, "kserve_program.py", task(arrays, server.port))
    assert tuple(map(int, told["versions"]["kserve"].split(".")[:2])) >= (0, 17)
    assert int(told["versions"]["protobuf"].partition(".")[0]) < 7
    assert len(told["done"]) > 100


def test_a_token(kserve_python: Path, models: Path, arrays: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with serving(models, tmp_path / "log", "--token-file", str(tmp_path / "token")) as guarded:
        told = run(kserve_python, "kserve_program.py", task(arrays, guarded.port, token=TOKEN))
    assert len(told["done"]) == 5


def test_every_call_over_grpc(kserve_python: Path, models: Path, arrays: dict[str, str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bnexport", "serve", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    help_text = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True, env=environment).stdout
    if "--grpc-port" not in help_text:
        pytest.skip("bnexport serve has no --grpc-port yet")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(models, tmp_path / "log", "--grpc-port", str(port)) as server:
        told = run(kserve_python, "kserve_program.py", task(arrays, server.port, grpc=f"127.0.0.1:{port}"))
    assert len(told["done"]) > 15
