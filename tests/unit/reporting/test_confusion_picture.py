import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnexport.errors import OutputError
from bnexport.reporting.figures import COUNTED, NAMED, confusion_picture


def counts(n: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    found = generator.integers(0, 3, (n, n))
    found[range(n), range(n)] = 70 + np.arange(n)
    return found


def draw(path: Path, n: int, labels: list[str] | None = None) -> bytes:
    confusion_picture(counts(n), labels or [f"class {k}" for k in range(n)], path, title="$x_{ <b>")
    return path.read_bytes()


def test_a_picture_and_its_size(tmp_path: Path) -> None:
    for n in (2, 10, COUNTED + 1, 100):
        image = Image.open(io.BytesIO(draw(tmp_path / f"{n}.png", n)))
        assert 400 < image.width < 2500
        assert 400 < image.height < 2500


def test_every_cell_shows_its_count_up_to_a_number(tmp_path: Path) -> None:
    few, many = draw(tmp_path / "few.svg", 10).decode(), draw(tmp_path / "many.svg", COUNTED + 1).decode()
    for k in range(10):
        assert f"<!-- {70 + k} -->" in few
    assert f"<!-- {70 + COUNTED} -->" not in many


def test_names_are_thinned_out_and_literal(tmp_path: Path) -> None:
    named = draw(tmp_path / "a.svg", NAMED).decode()
    assert all(f"<!-- class {k} -->" in named for k in range(NAMED))
    thinned = draw(tmp_path / "b.svg", 100).decode()
    assert "<!-- class 95 -->" in thinned
    assert "<!-- class 96 -->" not in thinned
    hostile = draw(tmp_path / "c.svg", 3, ["$x_{", "a\x1b[31mb", "a name of more than eighteen letters"]).decode()
    for shown in ("<!-- $x_{ -->", "<!-- a?[31mb -->", "<!-- a name of more... -->"):
        assert shown in hostile, shown


def test_the_same_counts_give_the_same_bytes(tmp_path: Path) -> None:
    assert draw(tmp_path / "a.svg", 5) == draw(tmp_path / "b.svg", 5)


def test_a_class_without_samples_is_drawn_empty(tmp_path: Path) -> None:
    empty = np.zeros((3, 3), int)
    confusion_picture(empty, ["a", "b", "c"], tmp_path / "a.png", title="")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"neither a \.png nor a \.svg"):
        draw(tmp_path / "a.gif", 3)
    assert list(tmp_path.iterdir()) == []
