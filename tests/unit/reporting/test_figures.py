import io
import math
import sys
from pathlib import Path

import pytest
from PIL import Image

from bnexport.errors import OutputError
from bnexport.reporting.figures import CURVES, learning_curves

HISTORY = [
    {"epoch": k + 1, "train_loss": 1 / (k + 1), "train_accuracy": 0.8 + k / 50, "test_accuracy": 0.7 + k / 40}
    for k in range(4)
]


def colours(png: bytes) -> set[tuple[int, ...]]:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return {colour for _, colour in image.getcolors(maxcolors=image.width * image.height) or []}


def rgb(hexadecimal: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(hexadecimal.lstrip("#")))


def test_learning_curves_draw_all_three(tmp_path: Path) -> None:
    path = tmp_path / "run" / "curves.png"
    learning_curves(HISTORY, path, title="BN-LeNet")
    assert {rgb(colour) for _, colour, _ in CURVES.values()} <= colours(path.read_bytes())
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


def test_learning_curves_as_svg_hold_the_numbers_drawn(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    learning_curves(HISTORY, first, title="$x_{ <b>")
    learning_curves(HISTORY, second, title="$x_{ <b>")
    assert first.read_bytes() == second.read_bytes(), "the same data give the same bytes"
    learning_curves([{**row, "train_loss": 0.5} for row in HISTORY], second, title="$x_{ <b>")
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize(
    "history",
    [
        [],
        HISTORY[:1],
        [{"epoch": 1, "train_loss": math.nan, "train_accuracy": None}],
        [{"epoch": 1, "train_loss": math.inf, "train_accuracy": 0.1, "test_accuracy": 0.1}],
    ],
    ids=["empty", "one epoch", "nan and missing", "infinite"],
)
def test_learning_curves_of_odd_histories(tmp_path: Path, history: list[dict[str, float]]) -> None:
    learning_curves(history, tmp_path / "c.png", title="")
    assert len(colours((tmp_path / "c.png").read_bytes())) > 2


def test_learning_curves_refuse_another_suffix(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"neither a \.png nor a \.svg"):
        learning_curves(HISTORY, tmp_path / "c.gif", title="")
    assert list(tmp_path.iterdir()) == []


def test_figures_leave_pyplot_alone(tmp_path: Path) -> None:
    learning_curves(HISTORY, tmp_path / "c.png", title="")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
