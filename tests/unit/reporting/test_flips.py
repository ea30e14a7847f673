from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from bnexport.reporting.flips import SHOWN_FLIPS, class_name, flipped_rows, picture
from bnexport.verification.findings import Findings, FlippedSample
from bnexport.verification.verdict import VerificationReport


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_picture_is_stretched_to_black_and_white() -> None:
    array = np.linspace(-3.0, 5.0, 12, dtype=np.float32).reshape(1, 3, 4)
    image = opened(picture(array))
    assert image.size == (4, 3)
    assert (np.asarray(image)[0, 0], np.asarray(image)[2, 3]) == (0, 255)
    assert opened(picture(np.random.default_rng(0).random((3, 8, 8)))).mode == "RGB"
    assert opened(picture(np.zeros((2, 5, 5)))).size == (5, 5)  # constant values
    assert max(opened(picture(np.random.default_rng(0).random((3, 500, 300)))).size) <= 112


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.full((1, 2, 2), np.nan), np.zeros((0, 2, 2))])
def test_what_is_no_picture_has_none(array: np.ndarray) -> None:
    assert picture(array) == ""


def test_what_nothing_explains_comes_first() -> None:
    samples = tuple(FlippedSample(i, 1, 2, 3, 0.1, 0.1, explained=i != 40) for i in range(50))
    report = VerificationReport(
        (), findings=Findings(flipped={"a": samples}), pictures={40: np.eye(4)[None], 49: np.eye(4)[None]}
    )
    rows = flipped_rows(report)
    assert len(rows) == 50
    assert rows[0][1].index == 40
    assert rows[0][2].startswith("data:image/png")
    assert rows[-1][2] == ""  # beyond what is shown, no picture is made
    assert SHOWN_FLIPS < 50


def test_class_names() -> None:
    assert class_name(None, ("a",)) == "-"
    assert class_name(0, ("a",)) == "a"
    assert class_name(7, ("a",)) == "7"
    assert class_name(7, None) == "7"
