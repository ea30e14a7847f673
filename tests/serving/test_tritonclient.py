"""The stock client of Triton, unchanged, in an environment of its own: its protobuf is older than the one onnx brings."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
from support.serving import Server


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
