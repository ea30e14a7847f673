import base64
import io

import numpy as np
import pytest
from PIL import Image

from bnexport.reporting.summary import Confusion, class_name, confusions, flips, picture, pictures
from bnexport.verification.verdict import Findings, FlippedSample, VerificationReport


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
def test_arrays_that_are_not_pictures_have_none(array: np.ndarray) -> None:
    assert picture(array) == ""


def report_of(**runs: tuple[FlippedSample, ...]) -> VerificationReport:
    return VerificationReport(
        (), findings=Findings(flipped=runs), pictures={40: np.eye(4)[None], 49: np.full((1, 4, 4), np.nan)}
    )


def test_unexplained_flips_come_first_then_the_largest_margins() -> None:
    samples = tuple(FlippedSample(i, 1, 2, 3, i / 100, 0.1, explained=i != 40) for i in range(50))
    found = flips(report_of(a=samples))
    assert [flip.sample.index for flip in found[:3]] == [40, 49, 48]
    assert len(found) == 50


def test_one_sample_on_two_runs_is_one_flip_and_its_worst_case_counts() -> None:
    mild = FlippedSample(4, 1, 2, 3, 0.1, 0.1, explained=True)
    worse = FlippedSample(4, 1, 2, 3, 0.1, 0.4, explained=False)
    other = FlippedSample(4, 1, 2, 5, 0.1, 0.1, explained=True)
    found = flips(report_of(a=(mild,), b=(worse,), c=(other,)))
    assert [(flip.sample, flip.runs) for flip in found] == [(worse, ("a", "b")), (other, ("c",))]


def test_pictures_are_made_of_what_is_shown_alone() -> None:
    samples = tuple(FlippedSample(i, 1, 2, 3, 0.1, 0.1, explained=True) for i in (3, 40, 49))
    report = report_of(a=samples)
    assert list(pictures(report, flips(report))) == [40]
    assert pictures(report, flips(report)[:1]) == {}


def test_confusions_count_samples_once() -> None:
    def sample(index: int, candidate: int, explained: bool = True) -> FlippedSample:
        return FlippedSample(index, None, 2, candidate, 0.1, 0.1, explained)

    report = report_of(a=(sample(1, 5), sample(2, 3)), b=(sample(1, 5, explained=False), sample(7, 5)))
    assert confusions(report) == [Confusion(2, 5, 2, 1, 2), Confusion(2, 3, 1, 0, 1)]


def test_large_pictures_in_colour_take_little_room() -> None:
    smooth = np.linspace(0, 1, 3 * 224 * 224).reshape(3, 224, 224)
    assert len(picture(smooth)) < 12_000


def test_class_names() -> None:
    assert class_name(None, ("a",)) == "-"
    assert class_name(0, ("a",)) == "a"
    assert class_name(7, ("a",)) == "7"
    assert class_name(7, None) == "7"
    assert class_name(-1, ("a", "b")) == "-1"
