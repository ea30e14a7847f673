"""One array of an .npz file, read in turn and never as a whole: memory stays that of a batch."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from bnexport.errors import DataError
from bnexport.optional import one_line
from bnexport.tensors import Array

_REMEDY = "Give an .npz file with one array of uint8 images, or name it with --column"


def shape_in_npz(path: Path, column: str) -> tuple[int, ...]:
    """Shape of the array of images.

    Raises:
        DataError: There is none, or it is no stack of uint8 images.
    """
    with _opened(path, column) as (_, shape):
        return shape


def images_in_npz(path: Path, column: str, *, start: int, rows: int, batch: int) -> Iterator[Array]:
    """Rows of the array of images, in batches.

    Args:
        path: Of the file.
        column: Name of the array, where there are several.
        start: First row; what lies before it is unpacked and thrown away.
        rows: How many.
        batch: Rows at a time.

    Raises:
        DataError: As ``shape_in_npz``, or it ends too early.
    """
    with _opened(path, column) as (file, shape):
        size = math.prod(shape[1:])
        file.seek(start * size, 1)
        for done in range(0, rows, batch):
            count = min(batch, rows - done)
            content = file.read(count * size)
            if len(content) != count * size:
                raise DataError(f"{path} ends in the middle of an image", remedy=_REMEDY)
            yield np.frombuffer(content, np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _opened(path: Path, column: str) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The member, behind its header, and its shape."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_member(path, archive.namelist(), column)) as file:
            version = np.lib.format.read_magic(file)
            read: Any = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(file)
            if dtype != np.uint8 or len(shape) < 3 or fortran:
                raise DataError(
                    f"{path} holds {dtype} of shape {shape}, expected a stack of uint8 images in C order",
                    remedy=_REMEDY,
                )
            yield file, tuple(shape)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise DataError(f"{path} is not a whole .npz file: {one_line(error)}", remedy=_REMEDY) from error


def _member(path: Path, names: list[str], column: str) -> str:
    if f"{column}.npy" in names:
        return f"{column}.npy"
    if len(names) != 1:
        have = ", ".join(repr(name.removesuffix(".npy")) for name in names[:10]) or "nothing"
        raise DataError(f"{path} holds no array {column!r} but {have}", remedy="Name one with --column")
    return names[0]
