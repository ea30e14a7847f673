import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runtime_only.absence import HEAVY, SERVING

from bnexport.data.datasets import load_dataset

ROOT = Path(__file__).parents[2]
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the embedded digits: pixels.npy, picture.png, floats.npy."""
    folder = tmp_path_factory.mktemp("files")
    pixels = load_dataset("digits").test_images[:3]
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "large.npy", np.repeat(np.repeat(pixels, 2, 1), 2, 2))
    np.save(folder / "floats.npy", pixels[:, None].astype(np.float32) / 255)
    Image.fromarray(pixels[0]).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="session")
def without() -> Run:
    """Run commands in one process that has only the packages given."""

    def run(commands: list[list[str]], packages: tuple[str, ...] = SERVING) -> list[dict[str, Any]]:
        program = [
            sys.executable,
            str(Path(__file__).with_name("absence.py")),
            ",".join(packages),
            json.dumps(commands),
        ]
        environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
        environment.pop("BNEXPORT_DEBUG", None)
        done = subprocess.run(program, capture_output=True, text=True, timeout=240, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        answer = json.loads(done.stdout)
        assert not (HEAVY - set(packages)) & set(answer["loaded"])
        results: list[dict[str, Any]] = answer["results"]
        for words, result in zip(commands, results, strict=True):
            assert "Traceback" not in result["err"], (words, result["err"])
            assert result["code"] != 70, (words, result["err"])
        return results

    return run
