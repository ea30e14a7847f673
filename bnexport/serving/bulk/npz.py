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

from bnexport.data.images import stack_problem
from bnexport.errors import DataError
from bnexport.optional import one_line
from bnexport.tensors import Array

_REMEDY = "Give an .npz file with one array of uint8 images, or name it with --column"


class NpzStream:
    """One array, read from its start to its end; close it.

    Args:
        path: Of the file.
        column: Name of the array, where there are several.

    Attributes:
        shape: (n, height, width, ...).
        row: The next one that is read.

    Raises:
        DataError: There is no such array, or it is no stack of uint8 images.
    """

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column, self.row = path, column, 0
        with contextlib.ExitStack() as stack, _reading(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            self._file = stack.enter_context(archive.open(_member(path, archive.namelist(), column)))
            self.shape = _shape(path, self._file)
            self._stack = stack.pop_all()

    def batches(self, start: int, rows: int, *, batch: int) -> Iterator[Array]:
        """Rows in batches; what lies between the next row and ``start`` is unpacked and thrown away.

        Args:
            start: First row, not before ``row``.
            rows: How many.
            batch: Rows at a time.

        Raises:
            DataError: It is damaged or ends too early.
        """
        while self.row < start:
            self._take(min(batch, start - self.row))
        for done in range(0, rows, batch):
            yield self._take(min(batch, rows - done))

    def _take(self, count: int) -> Array:
        size = count * math.prod(self.shape[1:])
        with _reading(self.path):
            content = self._file.read(size)
        if len(content) != size:
            raise DataError(f"{self.path} ends in the middle of an image", remedy=_REMEDY)
        self.row += count
        return np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])

    def close(self) -> None:
        """Close the file."""
        self._stack.close()


class NpzFiles:
    """The stream that a worker reads, kept open from shard to shard: each would unpack all before it, else."""

    def __init__(self) -> None:
        self._open: NpzStream | None = None

    def stream(self, path: Path, column: str, *, start: int) -> NpzStream:
        """A stream that has not yet come past a row.

        Raises:
            DataError: As ``NpzStream``.
        """
        found = self._open
        if found is None or (found.path, found.column) != (path, column) or found.row > start:
            self.close()
            self._open = found = NpzStream(path, column)
        return found

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            self._open.close()
            self._open = None


def _shape(path: Path, file: IO[bytes]) -> tuple[int, ...]:
    """Read a member's header; the file is then at its first row."""
    version = np.lib.format.read_magic(file)
    read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if (problem := stack_problem(str(dtype), tuple(shape), fortran=fortran)) is not None:
        raise DataError(f"{path} {problem}", remedy=_REMEDY)
    return tuple(shape)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise DataError(f"{path} is not a whole .npz file: {one_line(error)}", remedy=_REMEDY) from error


def _member(path: Path, names: list[str], column: str) -> str:
    if f"{column}.npy" in names:
        return f"{column}.npy"
    if len(names) != 1:
        have = ", ".join(repr(name.removesuffix(".npy")) for name in names[:10]) or "nothing"
        raise DataError(f"{path} holds no array {column!r} but {have}", remedy="Name one with --column")
    return names[0]
