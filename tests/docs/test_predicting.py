"""docs/predicting.md and docs/deploying.md: what a reader types, typed in their order in one folder."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.documents import commands

from bnexport.bundle import MODEL_ONNX
from bnexport.data.datasets import load_dataset

ROOT = Path(__file__).parents[2]


def lines(name: str) -> list[list[str]]:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return [words for words in commands(text) if words[0] == "bnexport"]


def typed(words: list[str], folder: Path) -> str:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def test_every_line_of_predicting_runs(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "photos").mkdir()
    images = load_dataset("digits").test_images[:6]
    for name, image in zip(("shoe", "shirt", "photos/a", "photos/b"), images, strict=False):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    np.save(tmp_path / "day1.npy", images)
    np.savez(tmp_path / "day2.npz", image=images)
    Image.fromarray(images[0]).save(stream := io.BytesIO(), "PNG")
    table = pyarrow.table({"sku": ["x"], "picture": [stream.getvalue()]})
    parquet.write_table(table, tmp_path / "shop.parquet")
    outputs = [typed(words, tmp_path) for words in lines("predicting.md") if "ray" not in words]
    assert "shoe.png" in outputs[0]
    assert [re.match(r"\d+ rows?", text)[0] for text in outputs[1:]] == ["2 rows", "12 rows", "1 row"]


def test_every_line_of_deploying_runs(tmp_path: Path) -> None:
    for package in ("yaml", "jsonschema"):
        pytest.importorskip(package)
    (tmp_path / "models").symlink_to(ROOT / "models")
    shown = lines("deploying.md")
    for words in shown:
        if "--wheel" in words:
            (tmp_path / words[words.index("--wheel") + 1]).write_bytes(b"")
        assert "next: " in typed(words, tmp_path)
    folders = [words[words.index("--out") + 1] for words in shown]
    assert len(folders) == len(set(folders)) == 6
    assert all(list((tmp_path / folder).rglob(MODEL_ONNX)) for folder in folders)
