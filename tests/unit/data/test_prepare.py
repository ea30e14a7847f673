"""Images fitted to a model are what the same pictures give as files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bnexport.data.images import load_images, prepared
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError


def wanted_images(channels, height, width):
    return Preprocessing(channels, height, width, mean=(0.0,) * channels, std=(1.0,) * channels)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def from_files(folder, images, preprocessing):
    """Return the pixels that prediction reads from (n, H, W) or (n, C, H, W), each image stored as a PNG."""
    rows = []
    for index, image in enumerate(images):
        picture = image if image.ndim == 2 else image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(picture)).save(file := folder / f"{index}.png")
        ((_, fitted),) = load_images(file, preprocessing)
        rows.append(fitted[None] if fitted.ndim == 2 else fitted.transpose(2, 0, 1))
    return np.stack(rows)


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.sampled_from([0, 1, 3]), st.integers(1, 12), st.integers(1, 12)),
    wanted=st.tuples(st.sampled_from([1, 3]), st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 99),
)
def test_it_gives_what_the_same_pictures_give_as_files(tmp_path_factory, source, wanted, seed):
    channels, *size = source
    images = pixels(2, *([channels] if channels else []), *size, seed=seed)
    fitted = prepared(images, wanted_images(*wanted))
    assert fitted.dtype == np.uint8
    assert fitted.shape == (2, *wanted)
    assert np.array_equal(fitted, from_files(tmp_path_factory.mktemp("png"), images, wanted_images(*wanted)))


def test_rgb_becomes_grey_by_the_weights_of_the_eye():
    primaries = np.eye(3, dtype=np.uint8).reshape(3, 3, 1, 1) * 255
    assert prepared(primaries, wanted_images(1, 1, 1)).ravel().tolist() == [76, 150, 29]


@pytest.mark.parametrize(
    ("shape", "wanted"), [((4, 6, 5), (1, 6, 5)), ((4, 1, 6, 5), (1, 6, 5)), ((4, 3, 6, 5), (3, 6, 5))]
)
def test_where_nothing_is_to_do_it_is_a_view(shape, wanted):
    images = pixels(*shape)
    assert np.shares_memory(prepared(images, wanted_images(*wanted)), images)


def test_no_images():
    assert prepared(pixels(0, 28, 28), wanted_images(3, 32, 32)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    "images",
    [pixels(4, 6, 5).astype(np.float32), pixels(6, 5), pixels(4, 6, 5, 3), pixels(4, 2, 6, 5), pixels(4, 0, 5)],
)
def test_arrays_without_images_are_refused(images):
    with pytest.raises(DataError, match="the images are an array of") as caught:
        prepared(images, wanted_images(1, 6, 5))
    assert caught.value.remedy


def test_a_model_of_two_channels_is_refused():
    with pytest.raises(DataError, match="2 channels"):
        prepared(pixels(4, 6, 5), wanted_images(2, 6, 5))


def test_the_result_is_an_input_by_preprocessing():
    images = pixels(4, 28, 28)
    inputs = wanted_images(3, 8, 9).apply(prepared(images, wanted_images(3, 8, 9)))
    assert inputs.shape == (4, 3, 8, 9)
    assert np.array_equal(inputs, prepared(images, wanted_images(3, 8, 9)).astype(np.float32) * np.float32(1 / 255))
