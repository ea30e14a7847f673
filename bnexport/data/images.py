"""Image files of users as pixel arrays that fit a model's preprocessing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnexport.data.idx import GZIP_MAGIC, read_idx
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError
from bnexport.optional import no_warnings, one_line, require
from bnexport.screening.limits import limit
from bnexport.screening.npy import check_header
from bnexport.screening.paths import check_regular
from bnexport.screening.refusal import Refusal, refusing
from bnexport.tensors import Array

if TYPE_CHECKING:
    from PIL.Image import Image

#: An image file may unpack to no more than this many pixels.
MAX_PIXELS = 50_000_000
#: Pillow's names of the formats that are read; of an animation, the first frame.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")
#: Endings of their files, in lower case. The content counts, not the name; a folder is searched by them.
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
#: The formats in words, for errors.
PICTURES = "PNG, JPEG, BMP, WebP or GIF file"
_NPY_MAGIC = b"\x93NUMPY"
_FILES = "PNG, JPEG, BMP, WebP, GIF, .npy or IDX file"
_REMEDY = f"Give a {_FILES} with images"


def load_images(
    path: str | Path,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  (frozen)
) -> list[tuple[str, Array]]:
    """Read a picture (PNG, JPEG, BMP, WebP, a GIF's first frame), .npy or IDX file (packed or not), told by its content.

    Images are turned upright as their EXIF tag says, laid on black where they are transparent, converted to grey or
    RGB and resized to the preprocessing's size by bilinear filtering; the aspect ratio is not kept. Pixels are not
    inverted: the known data sets are light on dark.

    Args:
        path: A file with one image, or with a stack: .npy uint8 (H, W), (H, W, 1|3|4), (n, H, W) or (n, H, W, 1|3|4),
            or IDX (n, H, W).
        preprocessing: Of the model: size and channels.

    Returns:
        One (name, image) per image: uint8 (height, width) for one channel, else (height, width, channels). The name
        is the file's, with [index] in a stack.

    Raises:
        DataError: The file is missing, damaged, too large, or not images.
    """
    file = Path(path)
    start = start_of(file)
    if start[:2] == GZIP_MAGIC or start[:2] == b"\0\0":
        return fit_stack(file, read_idx(file), preprocessing)
    if start.startswith(_NPY_MAGIC):
        return fit_stack(file, _read_npy(file), preprocessing)
    return [(str(file), read_picture_file(file, preprocessing, kinds=_FILES))]


def start_of(file: Path) -> bytes:
    """The first bytes of a file, as many as tell its kind.

    Raises:
        DataError: It is a folder, missing, empty, no plain file, or can't be read.
    """
    if file.is_dir():
        raise DataError(f"{file} is a folder, not an image", remedy=_REMEDY)
    try:
        with refusing(file, DataError, remedy=_REMEDY):
            check_regular(file)
        with file.open("rb") as opened:
            start = opened.read(len(_NPY_MAGIC))
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read: {one_line(error)}"
        raise DataError(f"{file} {what}", remedy="Check the path") from error
    if not start:
        raise DataError(f"{file} is empty", remedy=_REMEDY)
    return start


def _read_npy(file: Path) -> Array:
    try:
        with refusing(f"{file} is not a whole .npy file: it", DataError, remedy=_REMEDY), file.open("rb") as opened:
            check_header(opened.read(limit("npy-header") + 12), size := file.stat().st_size)
            if size > limit("array-bytes"):
                raise Refusal(f"has {size} bytes, more than {limit('array-bytes')}")
        # Mapping the file first: a header that promises more than the file holds fails without an allocation.
        array: Array = np.array(np.load(file, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise DataError(f"{file} is not a whole .npy file: {one_line(error)}", remedy=_REMEDY) from error
    return array


def fit_stack(file: Path, array: Array, preprocessing: Preprocessing) -> list[tuple[str, Array]]:
    """Split an array into images, each fitted.

    Args:
        file: Where it came from, for names and errors.
        array: uint8 (H, W), (H, W, 1|3|4), (n, H, W) or (n, H, W, 1|3|4).
        preprocessing: Of the model: size and channels.

    Returns:
        As ``load_images``.

    Raises:
        DataError: It is not images.
    """
    if array.dtype != np.uint8:
        raise DataError(
            f"{file} holds {array.dtype.name}, expected pixels as uint8", remedy="Save pixels from 0 to 255 as uint8"
        )
    coloured = array.ndim >= 3 and array.shape[-1] in (1, 3, 4)
    sample_dims = 3 if coloured else 2
    if array.ndim not in (sample_dims, sample_dims + 1) or array.size == 0:
        raise DataError(f"{file} holds an array of shape {array.shape}, which is not images", remedy=_REMEDY)
    if array.ndim == sample_dims:
        return [(str(file), fit_array(array, preprocessing))]
    return [(f"{file}[{index}]", fit_array(image, preprocessing)) for index, image in enumerate(array)]


def stack_problem(dtype: str, shape: tuple[int, ...], *, fortran: bool) -> str | None:
    """Why an array is no stack of images that can be read in turn, as a sentence without its end; None when it is one.

    Args:
        dtype: numpy's name of its element type.
        shape: Its own.
        fortran: Whether it is stored column by column.
    """
    coloured = bool(shape) and shape[-1] in (1, 3, 4)
    if dtype != "uint8" or fortran or len(shape) != (4 if coloured else 3):
        form = "(n, height, width) or (n, height, width, channels)"
        one = ": one picture in colour is saved as image[None]" if coloured and len(shape) == 3 else ""
        order = " in Fortran order" if fortran else ""
        return f"holds {dtype} of shape {shape}{order}, expected a stack of uint8 images in C order, {form}{one}"
    if 0 in shape[1:] or shape[1] * shape[2] > MAX_PIXELS:
        return f"holds images of {shape[2]}x{shape[1]} pixels, from 1 to {MAX_PIXELS} can be read"
    return None


def fit_array(image: Array, preprocessing: Preprocessing) -> Array:
    """Fit one image. What fits already needs no pillow, which a serving machine may lack.

    Args:
        image: uint8 (H, W) or (H, W, 1|3|4).
        preprocessing: Of the model: size and channels.

    Returns:
        As ``read_picture``; a new array.

    Raises:
        DataError: The model takes no grey or RGB images.
        MissingDependency: pillow is needed, and not installed.
    """
    plain = image[..., 0] if image.shape[2:] == (1,) else image
    colours = {1: (), 3: (3,)}.get(preprocessing.channels)
    if colours is not None and plain.shape == (preprocessing.height, preprocessing.width, *colours):
        return np.array(plain, order="C")
    module = require("PIL.Image", purpose="fitting images to the model's size")
    return _fit(module.fromarray(np.ascontiguousarray(plain)), preprocessing)


def read_picture_file(file: Path, preprocessing: Preprocessing, *, kinds: str = PICTURES) -> Array:
    """A picture's file as pixels that fit; its size is checked before it is read.

    Args:
        file: Where it is.
        preprocessing: Of the model: size and channels.
        kinds: For errors: what could have been given.

    Returns:
        As ``read_picture``.

    Raises:
        DataError: As ``read_picture``, or it can't be read.
    """
    try:
        if (size := file.stat().st_size) > (most := limit("picture-bytes")):
            raise DataError(f"{file} has {size} bytes, the limit is {most}", remedy=_REMEDY)
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} can't be read as an image: {one_line(error)}", remedy=_REMEDY) from error
    return read_picture(content, preprocessing, name=str(file), kinds=kinds)


def read_picture(content: bytes, preprocessing: Preprocessing, *, name: str, kinds: str = PICTURES) -> Array:
    """A picture in memory as pixels that fit; its size in pixels is checked before it is unpacked.

    Args:
        content: Of the file.
        preprocessing: Of the model: size and channels.
        name: For errors.
        kinds: For errors: what could have been given.

    Returns:
        uint8 (height, width) for one channel, else (height, width, channels).

    Raises:
        DataError: It is damaged, too large, or no picture.
        MissingDependency: pillow is not installed.
    """
    module = require("PIL.Image", purpose="reading images")
    ops = require("PIL.ImageOps", purpose="reading images")
    remedy = f"Give a {kinds} with an image"
    try:
        # Pillow's own warnings (a bomb, odd metadata) are for its callers: the limit below decides.
        with no_warnings, module.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"it has {picture.width}x{picture.height} pixels, the limit is {MAX_PIXELS}")
            return _fit(ops.exif_transpose(picture), preprocessing)
    except module.UnidentifiedImageError as error:
        raise DataError(f"{name} is not a {kinds}", remedy=remedy) from error
    except Exception as error:  # pillow raises OSError, SyntaxError, ValueError, struct.error and its bomb error
        raise DataError(f"{name} can't be read as an image: {one_line(error)}", remedy=remedy) from error


def _fit(picture: Image, preprocessing: Preprocessing) -> Array:
    """Convert and resize to what the preprocessing asks."""
    module = require("PIL.Image", purpose="reading images")
    if preprocessing.channels not in (1, 3):
        raise DataError(
            f"the model takes images of {preprocessing.channels} channels",
            remedy="Feed it arrays through the Python API",
        )
    if preprocessing.width * preprocessing.height > MAX_PIXELS:
        raise DataError(
            f"the model takes images of {preprocessing.width}x{preprocessing.height} pixels, the limit is {MAX_PIXELS}",
            remedy="Mend the preprocessing of the model or the manifest",
        )
    if picture.mode.startswith("I"):  # 16 bits per pixel: pillow would clip instead of scaling
        picture = module.fromarray((np.asarray(picture, np.int64) // 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        black = module.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = module.alpha_composite(black, picture.convert("RGBA"))
    picture = picture.convert("L" if preprocessing.channels == 1 else "RGB")
    size = (preprocessing.width, preprocessing.height)
    if picture.size != size:
        picture = picture.resize(size, module.Resampling.BILINEAR)
    return np.asarray(picture).copy()
