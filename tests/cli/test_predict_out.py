"""``bnexport predict`` with and without --out, as a user types it."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from bnexport.cli.main import run
from bnexport.cli.predict import BulkDisplay
from bnexport.data.datasets import load_dataset

REFERENCE = Path(__file__).parents[2] / "models" / "bn_lenet" / "1"


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    np.save(tmp_path / "stack.npy", load_dataset("digits").test_images[:30])
    return tmp_path / "stack.npy"


def predict(*words: str | Path) -> int:
    return run(["predict", str(REFERENCE), *map(str, words)])


def test_printing_and_writing_agree(stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(stack, "--json") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    out = tmp_path / "out"
    words = (stack, "--out", out, "--workers", "1", "--shard-rows", "8", "--batch-size", "5", "--logits")
    assert predict(*words) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"30 rows in 4 files of {out}, ")
    assert "30 images; 1 worker\n" in captured.err
    written = pq.read_table(out).to_pydict()
    assert written["id"] == [row["image"] for row in printed]
    assert written["label"] == [row["label"] for row in printed]
    assert np.allclose(written["logits"], [row["logits"] for row in printed], rtol=0, atol=1e-5)
    assert predict(*words, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["rows"], again["resumed_rows"]) == (30, 30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "ray"), "--engine is for --out"),
        (("--logits",), "--logits is for --out"),
        (("--force",), "--force is for --out"),
        (("--shard-rows", "5"), "--shard-rows is for --out"),
    ],
)
def test_options_that_need_out(
    stack: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert predict(stack, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["photos", "shop.parquet", "day.NPZ"])
def test_sources_that_need_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    source = tmp_path / name
    source.mkdir() if name == "photos" else source.write_bytes(b"x")
    assert predict(source) == 2
    printed = capsys.readouterr().err
    assert f"{source} holds many images, and predictions of many images are written to Parquet files" in " ".join(
        printed.split()
    )
    assert "Pass --out FOLDER" in printed


@pytest.mark.parametrize(
    ("name", "engine", "extra"), [("pyarrow", "local", "bnexport[parquet]"), ("ray", "ray", "bnexport[ray]")]
)
def test_a_missing_package_is_named(
    stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    name: str, engine: str, extra: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, name, None)
    assert predict(stack, "--out", tmp_path / "out", "--engine", engine) == 3
    assert extra in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert predict(stack) == 0, "labels on the terminal need neither"


def test_progress_in_a_log_and_on_a_terminal() -> None:
    log, screen = io.StringIO(), io.StringIO()
    for file, terminal in ((log, False), (screen, True)):
        with BulkDisplay(Console(file=file, force_terminal=terminal, width=80), pause=0.0) as display:
            display.on_start(100, 40, 2)
            display.on_shard(20)
            display.on_shard(40)
    lines = log.getvalue().splitlines()
    assert lines == ["100 images, 40 of them are there already; 2 workers", "60 of 100 images", "100 of 100 images"]
    assert "100/100" in screen.getvalue()
