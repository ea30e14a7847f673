from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnexport.errors import OutputError
from bnexport.reporting.figures import (
    CURVES,
    Samples,
    error_against_margin,
    error_histogram,
    error_overview,
    learning_curves,
)
from bnexport.reporting.summary import groups
from bnexport.verification.verdict import Row, VerificationReport

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


@pytest.mark.parametrize("draw", [error_histogram, error_against_margin])
def test_error_figures_are_reproducible_and_take_every_sample(draw: object, samples: Samples) -> None:
    assert callable(draw)
    png = draw(samples, tolerance=1e-5)
    assert png == draw(samples, tolerance=1e-5)
    worse = {**samples, "torch-cpu": (samples["torch-cpu"][0] * 30, samples["torch-cpu"][1])}
    assert png != draw(worse, tolerance=1e-5)


@pytest.mark.parametrize("draw", [error_histogram, error_against_margin])
@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"a": (np.array([]), np.array([]))},
        {"a": (np.zeros(3), np.zeros(3))},
        {"a": (np.array([np.nan, np.inf, 1e-6]), np.array([0.0, np.nan, 1e300]))},
        {f"runtime-{k}-$_": (np.full(2, 1e-6), np.full(2, 0.1)) for k in range(8)},
    ],
    ids=["none", "no samples", "exact", "not finite", "more runtimes than colours"],
)
def test_error_figures_of_odd_samples(draw: object, odd: Samples) -> None:
    assert callable(draw)
    assert Image.open(io.BytesIO(draw(odd, tolerance=1e-5))).width > 300


def test_error_overview_marks_failures(passing: VerificationReport, failing: VerificationReport) -> None:
    orange = rgb("#D55E00")

    def near(png: bytes) -> bool:
        return any(sum(abs(a - b) for a, b in zip(colour, orange, strict=True)) < 12 for colour in colours(png))

    assert not near(error_overview(groups(passing)))
    assert near(error_overview(groups(failing)))
    assert error_overview(())
    assert error_overview(groups(VerificationReport((Row("strict", "a", "b", False, error=None, bound=1e-5),))))


def test_figures_leave_pyplot_alone(samples: Samples) -> None:
    error_histogram(samples, tolerance=1e-5)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
