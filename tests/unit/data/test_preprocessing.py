import json

import numpy as np
import pytest

from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError

RGB = Preprocessing(3, 4, 5, scale=1 / 128, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_grey():
    images = pixels(3, 28, 28)
    inputs = Preprocessing().apply(images)
    assert inputs.dtype == np.float32
    assert inputs.shape == (3, 1, 28, 28)
    np.testing.assert_allclose(inputs[:, 0], images / 255, atol=1e-7)
    assert np.array_equal(Preprocessing().apply(images[..., None]), inputs)


def test_colour():
    images = pixels(2, 4, 5, 3)
    inputs = RGB.apply(images)
    assert inputs.shape == (2, 3, 4, 5)
    expected = (images / 128 - np.array(RGB.mean)) / np.array(RGB.std)
    np.testing.assert_allclose(inputs, expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert images.flags.writeable
    assert np.array_equal(images, pixels(2, 4, 5, 3))


def test_no_images():
    assert Preprocessing().apply(pixels(0, 28, 28)).shape == (0, 1, 28, 28)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pixels(2, 28, 28).astype(np.float32), "float32, expected uint8"),
        (pixels(2, 28, 27), "28x27, expected 28x28x1"),
        (pixels(2, 28, 28, 3), "28x28x3"),
        (pixels(28, 28), "expected 28x28x1"),
    ],
)
def test_images_that_do_not_fit_are_named(images, message):
    with pytest.raises(DataError, match=message):
        Preprocessing().apply(images)


@pytest.mark.parametrize("preprocessing", [Preprocessing(), RGB])
def test_json_round_trip(preprocessing):
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.0, 0.0]},
        {"std": [0.0]},
        {"scale": float("nan")},
        {"scale": "much"},
        {"height": 0},
        {"channels": None},
        {"mean": 3},
    ],
)
def test_bad_json(change):
    with pytest.raises(DataError, match="preprocessing"):
        Preprocessing.from_json({**Preprocessing().to_json(), **change})
    with pytest.raises(DataError, match="preprocessing"):
        Preprocessing.from_json({})


def test_channels_first():
    images = pixels(2, 3, 4, 5)
    inputs = RGB.apply(images)
    assert np.array_equal(inputs, RGB.apply(images.transpose(0, 2, 3, 1)))
    assert not np.shares_memory(inputs, images)
    assert np.array_equal(images, pixels(2, 3, 4, 5))


def test_images_that_could_be_read_both_ways_are_refused():
    square = Preprocessing(3, 3, 3, mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(DataError, match="first or last"):
        square.apply(pixels(2, 3, 3, 3))
