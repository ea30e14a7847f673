import gzip
import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image
from support.pictures import bomb, idx, png

from bnexport.data.images import load_images
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, MissingDependency

RGB = Preprocessing(3, 20, 30, mean=(0.0,) * 3, std=(1.0,) * 3)


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def saved(tmp_path, image, name="x.png", **options):
    file = tmp_path / name
    image.save(file, **options)
    return file


def one(file, *options):
    ((name, image),) = load_images(file, *options)
    assert name == str(file)
    return image


def test_a_grey_png_of_the_right_size_is_unchanged(tmp_path):
    pixels = picture(28, 28)
    assert np.array_equal(one(saved(tmp_path, Image.fromarray(pixels))), pixels)


def test_the_content_counts_not_the_name(tmp_path):
    pixels = picture(28, 28)
    file = saved(tmp_path, Image.fromarray(pixels), "photo.jpg", format="PNG")
    assert np.array_equal(one(file), pixels)


def test_colours_become_grey_and_grey_becomes_colours(tmp_path):
    red = np.zeros((28, 28, 3), np.uint8)
    red[..., 0] = 255
    assert np.unique(one(saved(tmp_path, Image.fromarray(red)))).tolist() == [76]
    image = one(saved(tmp_path, Image.fromarray(picture(20, 30))), RGB)
    assert image.shape == (20, 30, 3)
    assert np.array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize("name", ["x.bmp", "x.webp", "x.gif"])
def test_other_formats_without_loss(tmp_path, name):
    pixels = picture(28, 28)
    options = {"lossless": True} if name == "x.webp" else {}
    assert np.array_equal(one(saved(tmp_path, Image.fromarray(pixels), name, **options)), pixels)


def test_resizing_averages(tmp_path):
    board = np.indices((280, 280)).sum(0) % 2 * 255
    image = one(saved(tmp_path, Image.fromarray(board.astype(np.uint8))))
    assert image.shape == (28, 28)
    assert abs(image.mean() - 127.5) < 3
    assert image.std() < 10


def test_jpeg_with_an_orientation(tmp_path):
    pixels = np.zeros((28, 28), np.uint8)
    pixels[:14] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = one(saved(tmp_path, Image.fromarray(pixels), "x.jpg", exif=exif, quality=95))
    assert image[:10].max() < 30
    assert image[-10:].min() > 225


def test_transparent_pixels_are_black(tmp_path):
    pixels = np.full((28, 28, 4), 255, np.uint8)
    pixels[:, :14, 3] = 0
    image = one(saved(tmp_path, Image.fromarray(pixels)))
    assert (image[:, :14] == 0).all()
    assert (image[:, 14:] == 255).all()


def test_sixteen_bits_are_scaled(tmp_path):
    pixels = np.full((28, 28), 0x8080, np.uint16)
    assert np.unique(one(saved(tmp_path, Image.fromarray(pixels)))).tolist() == [0x80]


@pytest.mark.parametrize("shape", [(28, 28), (40, 30), (28, 28, 1), (28, 28, 3), (28, 28, 4)])
def test_npy_of_one_image(tmp_path, shape):
    file = tmp_path / "x.npy"
    np.save(file, picture(*shape))
    assert one(file).shape == (28, 28)


@pytest.mark.parametrize("shape", [(5, 28, 28), (5, 30, 30, 3)])
def test_npy_of_a_stack(tmp_path, shape):
    file = tmp_path / "x.npy"
    np.save(file, picture(*shape))
    images = load_images(file)
    assert [name for name, _ in images] == [f"{file}[{index}]" for index in range(5)]
    if shape == (5, 28, 28):
        assert np.array_equal(np.stack([image for _, image in images]), picture(*shape))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx(tmp_path, pack):
    pixels = picture(3, 28, 28)
    file = tmp_path / "t10k"
    file.write_bytes(pack(idx(pixels)))
    assert np.array_equal(np.stack([image for _, image in load_images(file)]), pixels)


def gif_bomb(side=60_000):
    """A GIF whose screen and first frame are side x side."""
    screen = b"GIF89a" + struct.pack("<2H3B", side, side, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<4HB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\0;"


def bmp_bomb(side=60_000):
    header = struct.pack("<IiiHH6I", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + header + bytes(100)


def webp_bomb(side=16_384):
    """A lossless WebP of the largest size that its header can state."""
    bits = struct.pack("<I", (side - 1) | (side - 1) << 14) + bytes(59)
    chunk = b"VP8L" + struct.pack("<I", 64) + b"\x2f" + bits
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"hello, this is text", "not a PNG, JPEG, BMP, WebP, GIF, .npy or IDX"),
        (png(Image.fromarray(picture(28, 28)))[:200], "can't be read as an image"),
        (bomb(), "can't be read as an image"),
        (bomb(9000), "pixels, but the limit is"),
        (gif_bomb(), "can't be read as an image"),
        (gif_bomb(9000), "pixels, but the limit is"),
        (bmp_bomb(), "can't be read as an image"),
        (bmp_bomb(9000), "pixels, but the limit is"),
        (webp_bomb(), "can't be read as an image"),
        (webp_bomb(9000), "pixels, but the limit is"),
        (npy(picture(28, 28))[:-5], "declares an array of"),
        (npy(picture(28, 28)).replace(b"28, 28", b"28, 99"), "declares an array of"),
        (
            npy(np.array([{}], object), allow_pickle=True),
            "can't be used: it holds an array of '|O', not of plain numbers",
        ),
        (npy(np.zeros((28, 28))), "float64, expected pixels as uint8"),
        (npy(picture(28)), "not a shape of images"),
        (npy(picture(0, 28, 28)), "not a shape of images"),
        (npy(picture(2, 3, 28, 28)), "not a shape of images"),
        (b"\0\0\x08\x01\0\0\0\x02\1\2", "not a shape of images"),
        (b"\0\0\x08\x03\0\0\0\x02", "truncated"),
    ],
)
def test_files_without_images_are_named(tmp_path, content, message):
    file = tmp_path / "x.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_images(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        load_images(tmp_path)


def test_a_model_of_other_channels(tmp_path):
    file = saved(tmp_path, Image.fromarray(picture(28, 28)))
    with pytest.raises(DataError, match="2 channels"):
        load_images(file, Preprocessing(2, mean=(0.0, 0.0), std=(1.0, 1.0)))


@pytest.mark.parametrize(("preprocessing", "shape"), [(Preprocessing(1, 20, 30), (20, 30)), (RGB, (20, 30, 3))])
def test_pixels_that_fit_need_no_pillow(tmp_path, monkeypatch, preprocessing, shape):
    stack = picture(4, *shape)
    np.save(tmp_path / "fit.npy", stack)
    np.save(tmp_path / "one.npy", stack[0])
    np.save(tmp_path / "large.npy", picture(4, 21, *shape[1:]))
    with_pillow = [image for _, image in load_images(tmp_path / "fit.npy", preprocessing)]
    for name in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    images = [image for _, image in load_images(tmp_path / "fit.npy", preprocessing)]
    assert np.array_equal(images, stack)
    assert np.array_equal(images, with_pillow)
    assert np.array_equal(one(tmp_path / "one.npy", preprocessing), stack[0])
    with pytest.raises(MissingDependency, match="fitting images to the model's size needs PIL"):
        load_images(tmp_path / "large.npy", preprocessing)


def test_grey_pixels_with_an_axis_for_the_channel_need_no_pillow(tmp_path, monkeypatch):
    np.save(tmp_path / "fit.npy", stack := picture(4, 28, 28, 1))
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert np.array_equal([image for _, image in load_images(tmp_path / "fit.npy")], stack[..., 0])
