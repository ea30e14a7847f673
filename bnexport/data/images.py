"""Image files, .npy files, IDX files and arrays of images as pixel arrays that fit a model's preprocessing.

An IDX file (LeCun, Cortes and Burges, "The MNIST database") has two zero bytes, a byte for the element type, a byte for the
number of dimensions, each dimension as a big-endian 32-bit number, then the elements, big-endian, in C order.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from bnexport.data.dataset_table import Images
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError
from bnexport.files import Refusal, input_errors
from bnexport.optional import no_warnings, one_line, require
from bnexport.tensors import Array
from bnexport.validation.archives import NPY_MAGIC, check_header
from bnexport.validation.limits import limit, refusing
from bnexport.validation.paths import check_regular

if TYPE_CHECKING:
    from PIL.Image import Image


#: The third byte of the file -> numpy's name of the element type in the file.
IDX_TYPES: dict[int, str] = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
#: Upper bound on the unpacked bytes of a file: 20 times the largest known set, and far below a machine's memory.
MAX_BYTES = limit("array-bytes")
GZIP_MAGIC = b"\x1f\x8b"
_MAX_DIMS = 8
_IDX_REMEDY = "Copy or download the file again"


def read_idx(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Array:
    """Return an IDX file's array in the machine's byte order; gzip is detected by content, not by name."""
    file = Path(path)
    try:
        with refusing(file, DataError, remedy=_IDX_REMEDY):
            check_regular(file)
        with file.open("rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            if not packed:
                return _read(raw, file, max_bytes)
            with gzip.GzipFile(fileobj=raw) as unpacked:
                return _read(unpacked, file, max_bytes)  # type: ignore[arg-type]
    except EOFError as error:
        raise DataError(f"{file} is truncated: its gzip stream is incomplete", remedy=_IDX_REMEDY) from error
    except (OSError, zlib.error) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read: {one_line(error)}"
        raise DataError(f"{file} {what}", remedy=_IDX_REMEDY) from error


def _read(stream: BinaryIO, file: Path, max_bytes: int) -> Array:
    dtype, shape = _header(stream, file)
    size = math.prod(shape) * dtype.itemsize
    if size > max_bytes:
        raise DataError(
            f"{file} declares {size} bytes, above the limit of {max_bytes}", remedy="Check the origin of the file"
        )
    content = stream.read(size + 1)
    if len(content) < size:
        raise DataError(f"{file} is truncated: it has {len(content)} of {size} bytes", remedy=_IDX_REMEDY)
    if len(content) > size:
        raise DataError(f"{file} is longer than its header declares ({size} bytes)", remedy=_IDX_REMEDY)
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _header(stream: BinaryIO, file: Path) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    magic = stream.read(4)
    if len(magic) < 4:
        what = "is empty" if not magic else f"is truncated: it has {len(magic)} bytes"
        raise DataError(f"{file} {what}", remedy=_IDX_REMEDY)
    if magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES or not 1 <= magic[3] <= _MAX_DIMS:
        raise DataError(f"{file} is not an IDX file (it starts with {magic.hex()})", remedy=_IDX_REMEDY)
    dims = stream.read(4 * magic[3])
    if len(dims) < 4 * magic[3]:
        raise DataError(f"{file} is truncated inside its header", remedy=_IDX_REMEDY)
    return np.dtype(IDX_TYPES[magic[2]]), tuple(int(dim) for dim in np.frombuffer(dims, ">u4"))


#: Upper bound on the pixels of an image file.
MAX_PIXELS = 50_000_000
#: Pillow's names of the supported formats; the first frame of an animation is read.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")
#: Endings of their files, in lower case, for the search in folders. The format of a file is detected by its content.
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
#: The formats in words, for errors.
PICTURES = "PNG, JPEG, BMP, WebP or GIF file"
_FILES = "PNG, JPEG, BMP, WebP, GIF, .npy or IDX file"
_REMEDY = f"Give a {_FILES} with images"


def folder_entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and the other entries of a folder by name, or raise DataError.

    A link counts as its target; hidden entries are ignored.
    """
    folders: list[Path] = []
    files: list[Path] = []
    with input_errors(folder, DataError, remedy="Check its permissions and its links"), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else files).append(folder / entry.name)
    return folders, files


def pictures_below(
    root: Path,
    *,
    endings: tuple[str, ...] = ENDINGS,
    seen: dict[tuple[int, int], Path] | None = None,
    below: tuple[str, ...] = (),
) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the images at any depth of a folder, as POSIX path below it and status; hidden entries are ignored.

    ``seen`` are the folders listed so far: a second link to a folder is refused, since its images would count twice.
    ``below`` are the names of the folders from the root to the listed one.
    """
    folder, seen = root.joinpath(*below), {} if seen is None else seen
    here = _status(folder)
    if (twin := seen.setdefault((here.st_dev, here.st_ino), folder)) is not folder:
        raise DataError(f"{folder} leads to {twin} again", remedy="Remove the link, so that each image counts once")
    if len(below) >= limit("name-parts"):
        raise DataError(
            f"{folder} lies more than {limit('name-parts')} folders deep", remedy="Move it to a higher folder"
        )
    folders, files = folder_entries(folder)
    for file in files:
        if file.name.lower().endswith(endings):
            status = _status(file)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{file} is not a plain file", remedy="Remove it")
            yield "/".join((*below, file.name)), status
    for deeper in folders:
        yield from pictures_below(root, endings=endings, seen=seen, below=(*below, deeper.name))


def _status(path: Path) -> os.stat_result:
    with input_errors(path, DataError, remedy="Check its permissions, or remove a broken link"):
        return path.stat()


def load_images(
    path: str | Path,
    preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  (frozen)
) -> list[tuple[str, Array]]:
    """Read an image (PNG, JPEG, BMP, WebP, the first frame of a GIF), .npy or IDX file; the kind is detected by content.

    Images are turned upright by their EXIF tag, put on black if they are transparent, converted to grey or RGB, and resized to
    the preprocessing's size by bilinear filtering; the aspect ratio is not kept. Pixels are not inverted: the known data sets
    are light on dark. A stack is .npy uint8 (H, W), (H, W, 1|3|4), (n, H, W) or (n, H, W, 1|3|4), or IDX (n, H, W).

    Returns:
        (name, image) of each image: uint8 (height, width) for one channel, else (height, width, channels). The name is the
        file's, with [index] in a stack.
    """
    file = Path(path)
    start = start_of(file)
    if start[:2] == GZIP_MAGIC or start[:2] == b"\0\0":
        return fit_stack(file, read_idx(file), preprocessing)
    if start.startswith(NPY_MAGIC):
        return fit_stack(file, _read_npy(file), preprocessing)
    return [(str(file), read_picture_file(file, preprocessing, kinds=_FILES))]


def start_of(file: Path) -> bytes:
    """Return the first bytes of a file, which determine its kind."""
    if file.is_dir():
        raise DataError(f"{file} is a folder, not an image", remedy=_REMEDY)
    try:
        with refusing(file, DataError, remedy=_REMEDY):
            check_regular(file)
        with file.open("rb") as opened:
            start = opened.read(len(NPY_MAGIC))
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read: {one_line(error)}"
        raise DataError(f"{file} {what}", remedy="Check the path") from error
    if not start:
        raise DataError(f"{file} is empty", remedy=_REMEDY)
    return start


def _read_npy(file: Path) -> Array:
    mapped = map_npy(file, most=limit("array-bytes"))
    try:
        return np.array(mapped)
    except (OSError, MemoryError) as error:
        raise DataError(f"{file} is not a complete .npy file: {one_line(error)}", remedy=_REMEDY) from error


def map_npy(file: Path, *, remedy: str = _REMEDY, most: int | None = None) -> np.memmap[Any, np.dtype[Any]]:
    """Map the array of a .npy file, after a check that the file has the bytes that its header declares."""
    try:
        with refusing(f"{file} can't be used: it", DataError, remedy=remedy), file.open("rb") as opened:
            check_header(opened.read(limit("npy-header") + 12), size := file.stat().st_size)
            if most is not None and size > most:
                raise Refusal(f"has {size} bytes, more than {most}")
        mapped: np.memmap[Any, np.dtype[Any]] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise DataError(f"{file} can't be read: {one_line(error)}", remedy=remedy) from error
    return mapped


def fit_stack(file: Path, array: Array, preprocessing: Preprocessing) -> list[tuple[str, Array]]:
    """Split an array into fitted images, as ``load_images`` returns them."""
    if array.dtype != np.uint8:
        raise DataError(
            f"{file} has elements of {array.dtype.name}, expected pixels as uint8",
            remedy="Save pixels from 0 to 255 as uint8",
        )
    coloured = array.ndim >= 3 and array.shape[-1] in (1, 3, 4)
    sample_dims = 3 if coloured else 2
    if array.ndim not in (sample_dims, sample_dims + 1) or array.size == 0:
        raise DataError(f"{file} has an array of shape {array.shape}, which is not a shape of images", remedy=_REMEDY)
    if array.ndim == sample_dims:
        return [(str(file), fit_array(array, preprocessing))]
    return [(f"{file}[{index}]", fit_array(image, preprocessing)) for index, image in enumerate(array)]


def stack_problem(dtype: str, shape: tuple[int, ...], *, fortran: bool) -> str | None:
    """Return the reason why an array is not a stack of images that can be read one by one; None if it is."""
    coloured = bool(shape) and shape[-1] in (1, 3, 4)
    if dtype != "uint8" or fortran or len(shape) != (4 if coloured else 3):
        form = "(n, height, width) or (n, height, width, channels)"
        one = ": save one colour image as image[None]" if coloured and len(shape) == 3 else ""
        order = " in Fortran order" if fortran else ""
        return f"has {dtype} of shape {shape}{order}, expected a stack of uint8 images in C order, {form}{one}"
    if 0 in shape[1:] or shape[1] * shape[2] > MAX_PIXELS:
        return f"has images of {shape[2]}x{shape[1]} pixels, expected 1 to {MAX_PIXELS}"
    return None


def fit_array(image: Array, preprocessing: Preprocessing) -> Array:
    """Return a new fitted array as ``read_picture`` does; an image that fits needs no Pillow (serving machines may lack it)."""
    plain = image[..., 0] if image.shape[2:] == (1,) else image
    colours = {1: (), 3: (3,)}.get(preprocessing.channels)
    if colours is not None and plain.shape == (preprocessing.height, preprocessing.width, *colours):
        return np.array(plain, order="C")
    module = require("PIL.Image", purpose="fitting images to the model's size")
    return _fit(module.fromarray(np.ascontiguousarray(plain)), preprocessing)


def read_picture_file(file: Path, preprocessing: Preprocessing, *, kinds: str = PICTURES) -> Array:
    """Read an image file as ``read_picture`` does; its size is checked first."""
    try:
        if (size := file.stat().st_size) > (most := limit("picture-bytes")):
            raise DataError(f"{file} has {size} bytes, but the limit is {most}", remedy=_REMEDY)
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} can't be read as an image: {one_line(error)}", remedy=_REMEDY) from error
    return read_picture(content, preprocessing, name=str(file), kinds=kinds)


def read_picture(content: bytes, preprocessing: Preprocessing, *, name: str, kinds: str = PICTURES) -> Array:
    """Decode an image in memory and fit it: uint8 (height, width) for one channel, else (height, width, channels).

    The number of pixels is checked before the image is unpacked.
    """
    module = require("PIL.Image", purpose="reading images")
    ops = require("PIL.ImageOps", purpose="reading images")
    remedy = f"Give a {kinds} with an image"
    try:
        # The limit below replaces Pillow's warnings (a bomb, odd metadata).
        with no_warnings, module.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"it has {picture.width}x{picture.height} pixels, but the limit is {MAX_PIXELS}")
            return _fit(ops.exif_transpose(picture), preprocessing)
    except module.UnidentifiedImageError as error:
        raise DataError(f"{name} is not a {kinds}", remedy=remedy) from error
    except Exception as error:  # pillow raises OSError, SyntaxError, ValueError, struct.error and its bomb error
        raise DataError(f"{name} can't be read as an image: {one_line(error)}", remedy=remedy) from error


def _fit(picture: Image, preprocessing: Preprocessing) -> Array:
    """Convert and resize to the preprocessing's size and channels."""
    module = require("PIL.Image", purpose="reading images")
    if preprocessing.channels not in (1, 3):
        raise DataError(
            f"the model needs images of {preprocessing.channels} channels, but image files have 1 or 3",
            remedy="Feed arrays through the Python API",
        )
    if preprocessing.width * preprocessing.height > MAX_PIXELS:
        raise DataError(
            f"the model needs images of {preprocessing.width}x{preprocessing.height} pixels, but the limit is {MAX_PIXELS}",
            remedy="Correct the preprocessing of the model or the manifest",
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


def prepared(images: Images, preprocessing: Preprocessing) -> Images:
    """Fit images to a model, bit for bit as ``load_images`` does for the same images in PNG files.

    The images are uint8 (n, H, W), or (n, C, H, W) with 1 or 3 channels. Grey is repeated to RGB, RGB is converted to grey by
    Pillow's weights (ITU-R 601-2: 0.299, 0.587, 0.114), and images are resized by bilinear filtering. The result, uint8
    (n, channels, height, width), is in memory, so a large set should be fitted in batches; it is a view of images that fit.

    Raises:
        DataError: The array has another type or shape, or the model has neither 1 nor 3 channels.
    """
    planes = images[:, np.newaxis] if images.ndim == 3 else images
    if images.dtype != np.uint8 or planes.ndim != 4 or planes.shape[1] not in (1, 3) or 0 in planes.shape[1:]:
        raise DataError(
            f"the images are an array of {images.dtype.name} and shape {images.shape}",
            remedy="Give uint8 of shape (n, H, W) or (n, C, H, W) with 1 or 3 channels",
        )
    wanted = (preprocessing.channels, preprocessing.height, preprocessing.width)
    if planes.shape[1:] == wanted:
        return planes
    if planes.shape[1] == 1 and wanted == (3, *planes.shape[2:]):
        return np.repeat(planes, 3, axis=1)
    fitted = np.empty((len(planes), *wanted), np.uint8)
    for index, image in enumerate(planes):
        fitted[index] = channels_first(
            fit_array(image[0] if len(image) == 1 else image.transpose(1, 2, 0), preprocessing)
        )
    return fitted


def channels_first(image: Images) -> Images:
    """Return a view of (H, W) or (H, W, C) as (C, H, W)."""
    return image[np.newaxis] if image.ndim == 2 else image.transpose(2, 0, 1)
