"""Where images come from, cut into shards: always the same ones for the same source.

A shard is the unit of work, of writing and of going on after a kill, so it must not depend on who asks or when.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bnexport.data.images import ENDINGS, stack_problem
from bnexport.errors import DataError, UsageError
from bnexport.optional import one_line, require
from bnexport.serving.bulk.request import BulkRequest
from bnexport.validation import validate_archive
from bnexport.validation.archives import check_header
from bnexport.validation.limits import limit, refusing

_REMEDY = "Give a folder of pictures, a .npy or .npz file of uint8 images, or Parquet with image bytes"


@dataclass(frozen=True)
class Shard:
    """Rows that one worker predicts and writes as one file.

    Attributes:
        number: Of its file, from 0.
        kind: A key of SOURCES.
        path: Of the folder or file.
        start: Number of its first row in the file.
        rows: How many.
        parts: Names of the pictures below the folder, or numbers of the row groups.
        stat: Size and time of the file when the shards were cut; of pictures, a digest of theirs.
    """

    number: int
    kind: str
    path: str
    start: int
    rows: int
    parts: tuple[str | int, ...] = ()
    stat: str = ""

    def check_unchanged(self) -> None:
        """Refuse a file that is another one than that which was cut into shards; a folder is not looked through again.

        Raises:
            DataError: It has another size or time, or is gone.
        """
        if self.kind != "folder" and _stat(Path(self.path)) != self.stat:
            raise DataError(
                f"{self.path} has changed while it was read",
                remedy="Leave the source as it is while it is read, and start again with --force",
            )


class Plan(NamedTuple):
    """One source, looked at but not read.

    Attributes:
        shards: Its rows in order; numbered from 0.
        fingerprint: Changes when the source does: sizes and times of its files, not their content.
    """

    shards: list[Shard]
    fingerprint: str


def plan(sources: tuple[Path, ...], request: BulkRequest) -> Plan:
    """Cut sources into shards.

    Raises:
        DataError: One is missing, empty, damaged, or nothing that images are read from.
        MissingDependency: Parquet without pyarrow.
        UsageError: One source is given twice, or lies in another; a column of ids where there are no columns.
    """
    _refuse_overlaps(sources)
    shards: list[Shard] = []
    digest = hashlib.sha256()
    for path in sources:
        _check_name(path)
        kind = _kind_of(path)
        if request.id_column is not None and kind != "parquet":
            raise UsageError(f"{path} has no column {request.id_column!r}", remedy="Leave --id-column to Parquet files")
        found = SOURCES[kind](path, request)
        if not found.shards:
            raise DataError(f"{path} holds no image", remedy=_REMEDY)
        digest.update(f"{path} {kind} {found.fingerprint}\n".encode())
        for shard in found.shards:
            shards.append(replace(shard, number=len(shards)))
    return Plan(shards, digest.hexdigest())


def _refuse_overlaps(sources: tuple[Path, ...]) -> None:
    places = [path.resolve() for path in sources]
    for index, place in enumerate(places):
        for other in (*places[:index], *places[index + 1 :]):
            if place == other or place.is_relative_to(other):
                raise UsageError(
                    f"{sources[index]} is given twice, or lies in another source", remedy="Give each image once"
                )


def _check_name(path: Path) -> None:
    """Ids are text, and hold the name."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path} has a name that is not UTF-8", remedy="Rename it") from error


def _kind_of(path: Path) -> str:
    try:
        if path.is_dir():
            return "parquet" if next(path.rglob("*.parquet"), None) is not None else "folder"
        if not path.exists():
            raise DataError(f"{path} does not exist", remedy="Check the path")
    except OSError as error:
        raise DataError(f"{path} can't be read: {one_line(error)}", remedy="Check the path") from error
    kind = path.suffix.lower().removeprefix(".")
    if kind not in SOURCES:
        raise DataError(
            f"{path} is no folder and no .npy, .npz or Parquet file",
            remedy=f"{_REMEDY}; single pictures are read without --out",
        )
    return kind


def _cut(kind: str, path: Path, rows: int, request: BulkRequest) -> list[Shard]:
    size, stat = request.shard_rows, _stat(path)
    return [Shard(0, kind, str(path), start, min(size, rows - start), stat=stat) for start in range(0, rows, size)]


def _plan_folder(path: Path, request: BulkRequest) -> Plan:
    found, digest, shards = sorted(_walk(path)), hashlib.sha256(), []
    for start in range(0, len(found), request.shard_rows):
        piece = found[start : start + request.shard_rows]
        stat = hashlib.sha256("".join(f"{name} {stat}\n" for name, stat in piece).encode()).hexdigest()
        digest.update(stat.encode())
        shards.append(Shard(0, "folder", str(path), start, len(piece), tuple(name for name, _ in piece), stat))
    return Plan(shards, digest.hexdigest())


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Every picture below a folder: POSIX path inside it, and its stat as text. Links to folders are not followed."""

    def failed(error: OSError) -> None:
        raise DataError(f"{folder} can't be read: {one_line(error)}", remedy="Check the folder") from error

    for place, _, names in os.walk(folder, onerror=failed):
        for name in names:
            if name.lower().endswith(ENDINGS):
                _check_name(file := Path(place, name))
                yield file.relative_to(folder).as_posix(), _stat(file)


def _stat(file: Path) -> str:
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(f"{file} can't be read: {one_line(error)}", remedy="Check the file") from error
    return f"{found.st_size} {found.st_mtime_ns}"


def _plan_npy(path: Path, request: BulkRequest) -> Plan:
    array = map_npy(path)
    fortran = array.ndim > 1 and array.flags.f_contiguous and not array.flags.c_contiguous
    if (problem := stack_problem(str(array.dtype), array.shape, fortran=fortran)) is not None:
        raise DataError(f"{path} {problem}", remedy=_REMEDY)
    return Plan(_cut("npy", path, len(array), request), _stat(path))


def map_npy(path: Path) -> Any:
    """The array of a .npy file, mapped and not read.

    Raises:
        DataError: It is damaged, or holds no plain numbers.
    """
    numpy = require("numpy", purpose="reading arrays")
    try:
        with refusing(f"{path} is not a whole .npy file: it", DataError, remedy=_REMEDY), path.open("rb") as file:
            check_header(file.read(limit("npy-header") + 12), path.stat().st_size)
        return numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise DataError(f"{path} is not a whole .npy file: {one_line(error)}", remedy=_REMEDY) from error


def _plan_npz(path: Path, request: BulkRequest) -> Plan:
    from bnexport.serving.bulk.npz import NpzStream

    validate_archive(path, "npz", error=DataError)
    with contextlib.closing(NpzStream(path, request.column)) as stream:
        return Plan(_cut("npz", path, stream.shape[0], request), _stat(path))


def _plan_parquet(path: Path, request: BulkRequest) -> Plan:
    """Whole row groups, as many as make a shard: a smaller unit could not be read without reading its group."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith((".", "_")))
        if (picture := next(_walk(path), None)) is not None:
            raise DataError(
                f"{path} holds Parquet files and pictures ({picture[0]})", remedy="Give the one or the other"
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
    return Plan(shards, digest.hexdigest())


def _row_groups(path: Path, request: BulkRequest) -> list[int]:
    """Rows of each row group, after a look at the columns."""
    from bnexport.serving.bulk.parquet import check_columns, opened

    with opened(path) as file:
        check_columns(path, file.schema_arrow, request)
        return [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]


#: Kind of source, a file's ending or "folder" -> what cuts it into shards. ``reading.READERS`` has a row for each.
SOURCES: dict[str, Callable[[Path, BulkRequest], Plan]] = {
    "folder": _plan_folder,
    "npy": _plan_npy,
    "npz": _plan_npz,
    "parquet": _plan_parquet,
}
