"""Sources of images: cuts them into shards, and reads them in batches that fit the model.

A shard is the unit of work, of writing and of resuming after a kill, so the shards depend only on the source and the options.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from bnexport.data.images import fit_stack, load_images, map_npy, pictures_below, read_picture, stack_problem
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, UsageError
from bnexport.files import input_errors
from bnexport.optional import one_line
from bnexport.serving.bulk.bulk_request import BulkRequest
from bnexport.serving.bulk.parquet import check_columns, encoded_images, opened
from bnexport.tensors import Array
from bnexport.validation import validate_archive

_NPZ_REMEDY = "Give an .npz file with one array of uint8 images, or name it with --column"


class NpzStream:
    """One array of an .npz file, read batch by batch; it is never in memory as a whole."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self.row = 0  # Index of the next row to be read
        with contextlib.ExitStack() as stack, _reading(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            self._file = stack.enter_context(archive.open(_member(path, archive.namelist(), column)))
            self.shape = _shape(path, self._file)
            self._stack = stack.pop_all()

    def batches(self, start: int, rows: int, *, batch: int) -> Iterator[Array]:
        """Yield rows in batches; rows before ``start`` are unpacked and dropped."""
        while self.row < start:
            self._take(min(batch, start - self.row))
        for done in range(0, rows, batch):
            yield self._take(min(batch, rows - done))

    def _take(self, count: int) -> Array:
        size = count * math.prod(self.shape[1:])
        with _reading(self.path):
            content = self._file.read(size)
        if len(content) != size:
            raise DataError(f"{self.path} ends in the middle of an image", remedy=_NPZ_REMEDY)
        self.row += count
        return np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])

    def close(self) -> None:
        """Close the file."""
        self._stack.close()


class NpzFiles:
    """The open stream of a worker, kept between shards: otherwise each shard would unpack all rows before it."""

    def __init__(self) -> None:
        self._open: NpzStream | None = None

    def stream(self, path: Path, column: str, *, start: int) -> NpzStream:
        """Return a stream that has not passed the row ``start``."""
        found = self._open
        if found is None or (found.path, found.column) != (path, column) or found.row > start:
            self.close()
            self._open = found = NpzStream(path, column)
        return found

    def close(self) -> None:
        """Close the open stream."""
        if self._open is not None:
            self._open.close()
            self._open = None


def _shape(path: Path, file: IO[bytes]) -> tuple[int, ...]:
    """Read a member's header; the file is then at its first row."""
    version = np.lib.format.read_magic(file)
    read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if (problem := stack_problem(str(dtype), tuple(shape), fortran=fortran)) is not None:
        raise DataError(f"{path} {problem}", remedy=_NPZ_REMEDY)
    return tuple(shape)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise DataError(f"{path} is not a complete .npz file: {one_line(error)}", remedy=_NPZ_REMEDY) from error


def _member(path: Path, names: list[str], column: str) -> str:
    if f"{column}.npy" in names:
        return f"{column}.npy"
    if len(names) != 1:
        have = ", ".join(repr(name.removesuffix(".npy")) for name in names[:10]) or "nothing"
        raise DataError(f"{path} contains no array {column!r}, only {have}", remedy="Name one with --column")
    return names[0]


_REMEDY = "Give a folder of pictures, a .npy or .npz file of uint8 images, or Parquet with image bytes"


@dataclass(frozen=True)
class Shard:
    """Rows that one worker predicts and writes as one file."""

    number: int  # Number of its file, from 0
    kind: str  # A key of SOURCES
    path: str  # The folder or file
    start: int  # Number of its first row in the file
    rows: int  # Number of rows
    parts: tuple[str | int, ...] = ()  # Names of the pictures below the folder, or numbers of the row groups
    stat: str = ""  # Size and time of the file when the shards were cut; of pictures, a digest of theirs

    def check_unchanged(self) -> None:
        """Refuse a file that has changed since the planning; a folder is not checked again."""
        if self.kind != "folder" and _stat(Path(self.path)) != self.stat:
            raise DataError(
                f"{self.path} has changed while it was read",
                remedy="Do not change the source while it is read, and start again with --force",
            )


class ShardPlan(NamedTuple):
    """The shards of the sources, before reading."""

    shards: list[Shard]  # Shards in the order of the rows, numbered from 0
    fingerprint: str  # Hash of the sizes and times of the sources' files


def plan(sources: tuple[Path, ...], request: BulkRequest) -> ShardPlan:
    """Cut sources into shards."""
    _refuse_overlaps(sources)
    shards: list[Shard] = []
    digest = hashlib.sha256()
    for path in sources:
        _check_name(path)
        kind = _kind_of(path)
        if request.id_column is not None and kind != "parquet":
            raise UsageError(
                f"{path} has no column {request.id_column!r}", remedy="Use --id-column only for Parquet files"
            )
        found = SOURCES[kind].plan(path, request)
        if not found.shards:
            raise DataError(f"{path} contains no image", remedy=_REMEDY)
        digest.update(f"{path} {kind} {found.fingerprint}\n".encode())
        for shard in found.shards:
            shards.append(replace(shard, number=len(shards)))
    return ShardPlan(shards, digest.hexdigest())


def _refuse_overlaps(sources: tuple[Path, ...]) -> None:
    places = [path.resolve() for path in sources]
    for index, place in enumerate(places):
        for other in (*places[:index], *places[index + 1 :]):
            if place == other or place.is_relative_to(other):
                raise UsageError(
                    f"{sources[index]} is given twice, or is inside another source", remedy="Give each image once"
                )


def _check_name(path: Path) -> None:
    """Refuse a name that is not UTF-8: ids are text and contain it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path} has a name that is not UTF-8", remedy="Rename it") from error


def _kind_of(path: Path) -> str:
    with input_errors(path, DataError, remedy="Check the path"):
        if path.is_dir():
            return "parquet" if next(path.rglob("*.parquet"), None) is not None else "folder"
        if not path.exists():
            raise DataError(f"{path} does not exist", remedy="Check the path")
    kind = path.suffix.lower().removeprefix(".")
    if kind not in SOURCES:
        raise DataError(
            f"{path} is neither a folder nor a .npy, .npz or Parquet file",
            remedy=f"{_REMEDY}; single pictures are read without --out",
        )
    return kind


def _cut(kind: str, path: Path, rows: int, request: BulkRequest) -> list[Shard]:
    size, stat = request.shard_rows, _stat(path)
    return [Shard(0, kind, str(path), start, min(size, rows - start), stat=stat) for start in range(0, rows, size)]


def _plan_folder(path: Path, request: BulkRequest) -> ShardPlan:
    found = sorted((name, f"{status.st_size} {status.st_mtime_ns}") for name, status in pictures_below(path))
    digest, shards = hashlib.sha256(), []
    for name, _ in found:
        _check_name(path / name)
    for start in range(0, len(found), request.shard_rows):
        piece = found[start : start + request.shard_rows]
        stat = hashlib.sha256("".join(f"{name} {stat}\n" for name, stat in piece).encode()).hexdigest()
        digest.update(stat.encode())
        shards.append(Shard(0, "folder", str(path), start, len(piece), tuple(name for name, _ in piece), stat))
    return ShardPlan(shards, digest.hexdigest())


def _stat(file: Path) -> str:
    with input_errors(file, DataError, remedy="Check the file"):
        found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _plan_npy(path: Path, request: BulkRequest) -> ShardPlan:
    array = map_npy(path, remedy=_REMEDY)
    fortran = array.ndim > 1 and array.flags.f_contiguous and not array.flags.c_contiguous
    if (problem := stack_problem(str(array.dtype), array.shape, fortran=fortran)) is not None:
        raise DataError(f"{path} {problem}", remedy=_REMEDY)
    return ShardPlan(_cut("npy", path, len(array), request), _stat(path))


def _plan_npz(path: Path, request: BulkRequest) -> ShardPlan:
    validate_archive(path, "npz", error=DataError)
    with contextlib.closing(NpzStream(path, request.column)) as stream:
        return ShardPlan(_cut("npz", path, stream.shape[0], request), _stat(path))


def _plan_parquet(path: Path, request: BulkRequest) -> ShardPlan:
    """Cut at row groups: a smaller unit could not be read without reading its whole group."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith((".", "_")))
        if (picture := next(pictures_below(path), None)) is not None:
            raise DataError(
                f"{path} contains Parquet files and pictures ({picture[0]})", remedy="Give a folder with one of them"
            )
    shards, digest = [], hashlib.sha256()
    for file in files:
        _check_name(file)
        digest.update(f"{file} {(stat := _stat(file))}\n".encode())
        groups: list[str | int] = []
        start = rows = 0
        sizes = _row_groups(file, request)
        for index, size in enumerate(sizes):
            groups.append(index)
            rows += size
            if rows and (rows >= request.shard_rows or index == len(sizes) - 1):
                shards.append(Shard(0, "parquet", str(file), start, rows, tuple(groups), stat))
                groups, start, rows = [], start + rows, 0
    return ShardPlan(shards, digest.hexdigest())


def _row_groups(path: Path, request: BulkRequest) -> list[int]:
    """Check the columns and return the rows of each row group."""
    with opened(path) as file:
        check_columns(path, file.schema_arrow, request)
        return [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]


#: Ids, and uint8 (n, height, width) or (n, height, width, channels).
Batch = tuple[list[str], Array]


def _read_folder(shard: Shard, request: BulkRequest, preprocessing: Preprocessing, _: NpzFiles) -> Iterator[Batch]:
    for start in range(0, shard.rows, request.rows_read()):
        found = []
        for part in shard.parts[start : start + request.rows_read()]:
            images = load_images(Path(shard.path, str(part)), preprocessing)
            if len(images) != 1:  # a stack with a picture's file name
                raise DataError(
                    f"{images[0][0]} is one of several images in a picture file", remedy="Name the file .npy"
                )
            found += images
        yield [name for name, _ in found], np.stack([image for _, image in found])


def _read_npy(shard: Shard, request: BulkRequest, preprocessing: Preprocessing, _: NpzFiles) -> Iterator[Batch]:
    return _stacks(shard, _npy_pieces(shard, request.rows_read()), preprocessing)


def _npy_pieces(shard: Shard, batch: int) -> Iterator[Array]:
    """Yield pieces of a .npy file, read into memory: mapped pages would count as this process's memory."""
    array = map_npy(Path(shard.path), remedy=_REMEDY)
    size = math.prod(array.shape[1:])
    with Path(shard.path).open("rb") as file:
        file.seek(array.offset + shard.start * size * array.itemsize)
        for done in range(0, shard.rows, batch):
            piece = np.fromfile(file, array.dtype, min(batch, shard.rows - done) * size)
            yield piece.reshape(-1, *array.shape[1:])


def _read_npz(shard: Shard, request: BulkRequest, preprocessing: Preprocessing, files: NpzFiles) -> Iterator[Batch]:
    stream = files.stream(Path(shard.path), request.column, start=shard.start)
    pieces = stream.batches(shard.start, shard.rows, batch=request.rows_read())
    return _stacks(shard, pieces, preprocessing)


def _stacks(shard: Shard, pieces: Iterator[Array], preprocessing: Preprocessing) -> Iterator[Batch]:
    row = shard.start
    for piece in pieces:
        ids = [f"{shard.path}[{number}]" for number in range(row, row + len(piece))]
        row += len(piece)
        yield ids, _fitted(shard.path, piece, preprocessing)


def _fitted(path: str, stack: Array, preprocessing: Preprocessing) -> Array:
    """Return a stack in the model's size: the stack itself if it fits already, otherwise fitted image by image."""
    colours = () if preprocessing.channels == 1 else (preprocessing.channels,)
    plain = stack[..., 0] if stack.ndim == 4 and stack.shape[3] == 1 else stack
    if plain.dtype == np.uint8 and plain.shape[1:] == (preprocessing.height, preprocessing.width, *colours):
        return np.ascontiguousarray(plain)
    return np.stack([image for _, image in fit_stack(Path(path), np.array(stack), preprocessing)])


def _read_parquet(shard: Shard, request: BulkRequest, preprocessing: Preprocessing, _: NpzFiles) -> Iterator[Batch]:
    groups = [int(part) for part in shard.parts]
    for ids, contents in encoded_images(Path(shard.path), request, row_groups=groups, start=shard.start):
        images = []
        for name, content in zip(ids, contents, strict=True):
            named = name if name.startswith(shard.path) else f"{shard.path}, {name}"
            if not content:
                raise DataError(f"{named} has no image", remedy="Remove rows without an image")
            images.append(read_picture(content, preprocessing, name=named))
        yield ids, np.stack(images)


class ImageSource(NamedTuple):
    """One row of SOURCES."""

    plan: Callable[[Path, BulkRequest], ShardPlan]  # Cuts a source into shards
    read: Callable[[Shard, BulkRequest, Preprocessing, NpzFiles], Iterator[Batch]]  # Yields a shard's batches in order


#: Kind of source (a file's ending or "folder") -> its functions.
SOURCES: dict[str, ImageSource] = {
    "folder": ImageSource(_plan_folder, _read_folder),
    "npy": ImageSource(_plan_npy, _read_npy),
    "npz": ImageSource(_plan_npz, _read_npz),
    "parquet": ImageSource(_plan_parquet, _read_parquet),
}
